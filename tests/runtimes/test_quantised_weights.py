"""Weights of 8 and 4 bits, and what ONNX Runtime makes of them."""

from __future__ import annotations

import pytest
import torch

from fastvlm.runtimes.layer_form import Product
from fastvlm.runtimes.quantised_weights import BITS, BLOCKS, quantise


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("width", [128, 70])
def test_rounding_is_to_the_nearest(bits: int, width: int) -> None:
    weight = torch.randn(5, width)
    weight[1] = 0
    weight[2] = weight[2].abs() + 3
    made, block = quantise(weight, bits), BLOCKS[bits]
    steps = made.scales.abs().repeat_interleave(block, 1)[:, :width]
    # At the ends of what the whole numbers reach it can be a step.
    least = torch.where(weight.abs() > steps * (2 ** (bits - 1) - 1.5), 1.0, 0.5)
    assert ((made.dense(width) - weight).abs() <= steps * least + 1e-6).all()
    assert (made.dense(width)[1] == 0).all()
    assert made.values.nbytes == 5 * -(-width // block) * block * bits // 8


@pytest.mark.parametrize("bits", BITS.values())
def test_products_are_those_of_the_rounded_weights(bits: int) -> None:
    pytest.importorskip("onnxruntime")
    from fastvlm.runtimes.graph_parts import Head
    from fastvlm.runtimes.head_pass import HeadPass
    from fastvlm.runtimes.layer_graph import head_graph

    weight, x = torch.randn(48, 70), torch.randn(1, 3, 70)
    found = HeadPass(head_graph(Head(None, Product(weight, None)), bits), 48).run(x)
    wanted = x @ quantise(weight, bits).dense(70).T
    # Inputs are rounded to 8 bits too.
    assert (found - wanted).abs().max() < 0.02 * wanted.std() + 0.1
