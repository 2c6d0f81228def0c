"""Models of text alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families.parts import OPT, ROTARY, Family, finished, lengths, written


def text(model_type: str, gain: float = 3.0, **options: Any) -> Family:
    """Return a model of text alone."""
    torch.manual_seed(5)
    shape = OPT if model_type == "opt" else {**ROTARY, "model_type": model_type}
    config = AutoConfig.for_model(**{**shape, **options})
    return finished(AutoModelForCausalLM.from_config(config), gain), lambda rows: written(
        lengths(rows), [0] * rows
    )
