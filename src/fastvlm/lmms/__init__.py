"""fastvlm as a model of lmms-eval, so that its tasks run on this engine.

    lmms-eval --model fastvlm --model_args pretrained=DIR,draft=DIR --tasks mme --batch_size 16

lmms-eval finds it by the entry point `lmms_eval.models`. A slow test runs tasks of both
kinds, replies and choices, with lmms-eval itself.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's manifest of the model, whose class is imported when it is chosen."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="fastvlm", simple_class_path="fastvlm.lmms.model.FastVlm")
