"""What a step costs beside the model's own layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import fastvlm
from fastvlm.decoding import Autoregressive, Engine, Request
from fastvlm.language import split_decoder
from tests.decoding.conftest import inputs_of
from tests.models import LIVELY

OWN = (str(Path(fastvlm.__file__).parent), "<string>")
"""Where our functions are, and those that dataclasses make."""
LAYERS = ("bare.py", "fused.py", "packed.py", "products.py")
"""Where layers are computed in the place of the model's own code."""


def calls_of(work: Callable[[], object]) -> list[str]:
    """Return which of our functions some work calls, in their order."""
    found: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(OWN) and not file.endswith(LAYERS):
            found.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("special", [{}, {"use_sliding_window": True, "max_window_layers": 1}])
def test_a_layer_costs_a_step_no_call_but_its_caches(special: dict[str, Any]) -> None:
    steps = []
    for depth in (3, 7):
        options = {**LIVELY, **special, "num_hidden_layers": depth, "vocab_size": 50}
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        model = AutoModelForCausalLM.from_config(config).eval()
        engine = Engine(split_decoder(model))
        engine.add(Request(inputs_of(model, [3, 1, 4]), Autoregressive(), 9))
        for _ in range(3):
            engine.step()
        steps.append(calls_of(engine.step))
    shallow, deep = steps
    assert shallow.count("update") == 3
    assert len(deep) - len(shallow) == 4 * len(["update", "exchange"])
