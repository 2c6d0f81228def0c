"""The roofline: weights counted in the bytes that they are read in, and limits by them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastvlm.evaluation.roofline import (
    Machine,
    measure_machine,
    pass_costs,
    shares,
    to_json,
    weights_of,
)
from fastvlm.functional.packed import available, pack
from fastvlm.language.quantised import Int4Linear, Int8Linear

WEIGHTS = 512 * 512


def linear() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(512, 512, bias=False)
    layer.weight.data.copy_(layer.weight.bfloat16())
    return layer


def test_weights_are_counted_as_they_are_read() -> None:
    layer = linear()
    assert weights_of(layer) == (WEIGHTS, 4 * WEIGHTS)
    assert weights_of(Int8Linear.of(layer)) == (WEIGHTS, WEIGHTS)
    assert weights_of(Int4Linear.of(layer)) == (WEIGHTS, WEIGHTS // 2)
    if available():
        pack([layer], 2**30)
        assert weights_of(nn.Sequential(layer, nn.ReLU())) == (WEIGHTS, 2 * WEIGHTS)


def test_limits_are_those_of_memory_or_of_arithmetic() -> None:
    decoder: Any = SimpleNamespace(layers=[linear(), linear()], lm_head=linear(), bits=None)
    strategies: Any = {
        "imitation": SimpleNamespace(network=linear(), exit_layer=1),
        "autoregressive": SimpleNamespace(),
        "prompt-lookup": SimpleNamespace(),
    }
    took = SimpleNamespace(median=10.0)
    given = {"autoregressive": (None, None), "imitation": (3.0, 2.0), "prompt-lookup": (7.0, 1.0)}
    results: Any = [
        SimpleNamespace(strategy=name, draft_length=draft, acceptance_length=length, tpot_ms=took)
        for name, (draft, length) in given.items()
    ]
    # A pass over more than two positions takes longer to compute than to read.
    machine = Machine(4e9 * WEIGHTS / 2**18, 4e9 * WEIGHTS / 2**18)
    costs = pass_costs(decoder, strategies, results, machine)
    step = 3 * 2**18 / 1e6
    expected = {
        ("step", "autoregressive"): step,
        ("draft", "imitation"): step * 2 / 3,
        ("verify", "imitation"): 2 * step,
        ("verify", "prompt-lookup"): 4 * step,
    }
    assert {(one.name, one.strategy): one.limit_ms for one in costs} == pytest.approx(expected)
    found = shares(costs, results)
    assert found["autoregressive"] == pytest.approx((step, step / 10))
    assert found["imitation"].limit_ms == pytest.approx((2 * step + 3 * step * 2 / 3) / 2)
    assert found["prompt-lookup"].limit_ms == pytest.approx(4 * step)
    assert set(to_json(machine, costs, found)["shares"]) == set(given)
    decoder.bits = 8
    assert pass_costs(decoder, strategies, results, machine)[0].weight_bytes == 3 * WEIGHTS


def test_the_machine_is_measured() -> None:
    machine = measure_machine(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.bytes_per_second < 1e13
    assert 1e8 < machine.operations_per_second < 1e15
