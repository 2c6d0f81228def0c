"""Models that lie on no device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastvlm.functional.placement import on_no_device
from tests.models import LIVELY


def test_a_model_on_no_device_has_the_parameters_of_any_other() -> None:
    options = {name: value for name, value in LIVELY.items() if name != "model_type"}
    config = AutoConfig.for_model("qwen2", **options, vocab_size=50)
    with on_no_device():
        shell = AutoModelForCausalLM.from_config(config)
    made = AutoModelForCausalLM.from_config(config)
    assert {name: weight.shape for name, weight in shell.named_parameters()} == {
        name: weight.shape for name, weight in made.named_parameters()
    }
    assert all(tensor.is_meta for tensor in shell.state_dict().values())


def initial_value() -> float:
    """Return a value that a new layer begins with, where memory held another before."""
    layer = nn.LayerNorm(1, device="cpu")
    nn.init.constant_(layer.weight, 3.0)
    return float(layer.weight.detach())


def test_other_threads_and_what_comes_after_have_initial_values() -> None:
    with ThreadPoolExecutor(1) as pool, on_no_device():
        assert nn.Linear(2, 2).weight.is_meta
        assert pool.submit(initial_value).result() == 3.0
    assert initial_value() == 3.0
    assert not nn.Linear(2, 2).weight.is_meta
    assert torch.get_default_device().type == "cpu"
