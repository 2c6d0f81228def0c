"""Matrices in bfloat16 that are packed in two layouts: few rows round alike, many are right too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvlm.functional import products
from fastvlm.functional.packed import available, pack
from fastvlm.functional.products import FEW_ROWS, OneDnnProduct, ProductByRows, half_gains

WIDTH = 512

pytestmark = pytest.mark.skipif(
    not available() or not products.packs(torch.bfloat16), reason="this CPU packs no bfloat16"
)


def in_bfloat16(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, *, twice: bool = True
) -> tuple[Any, Tensor]:
    """What multiplies by a matrix in bfloat16 where FBGEMM gains, and the matrix."""
    monkeypatch.setattr(products, "half_gains", lambda: True)
    torch.manual_seed(7)
    weight = torch.randn(*shape).bfloat16()
    return products.product_of(weight, twice=twice), weight


@pytest.mark.parametrize("shape", [(256, 256), (512, 700), (1000, 300)])
def test_a_verify_rounds_as_steps_do(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    product, weight = in_bfloat16(shape, monkeypatch)
    x, bias = torch.randn(FEW_ROWS, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
    together = product(x, weight, bias)
    exact = (x.double() @ weight.double().T + bias.double()).bfloat16()
    assert (together != exact).float().mean() < 1e-2
    for rows in range(1, FEW_ROWS):
        assert torch.equal(product(x[-rows:], weight, bias), together[-rows:])
        assert torch.equal(product(x[None, :rows], weight, bias)[0], together[:rows])


def test_rows_say_which_layout_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    product, weight = in_bfloat16((300, WIDTH), monkeypatch)
    product.few.multiply = lambda *_: torch.tensor(1.0)
    product.many.multiply = lambda *_: torch.tensor(2.0)
    found = [
        float(product(torch.zeros(*shape, WIDTH, dtype=torch.bfloat16), weight, None))
        for shape in ((1, 1), (1, FEW_ROWS), (FEW_ROWS, 1), (1, FEW_ROWS + 1), (2, FEW_ROWS))
    ]
    assert found == [1, 1, 1, 2, 2]


def test_one_layout_is_held_where_two_gain_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(in_bfloat16((300, WIDTH), monkeypatch, twice=False)[0], OneDnnProduct)
    weight = torch.randn(300, WIDTH).bfloat16()
    weight[5] *= 2.0**-40
    assert isinstance(products.product_of(weight, twice=True), OneDnnProduct)
    for has_tiles in (lambda: True, lambda: False, None):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", has_tiles)
        assert half_gains.__wrapped__() is (has_tiles is not None and not has_tiles())


def test_every_layer_is_packed_once_rather_than_some_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "half_gains", lambda: True)
    for room, kind, layouts in ((4, ProductByRows, 2), (3, OneDnnProduct, 1)):
        layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(2)]
        size = layers[0].weight.nbytes
        assert pack([*layers, layers[0]], room * size) == 2 * layouts * size
        for layer in layers:
            product = layer.packed.product
            assert type(product) is kind
            assert product.nbytes == layouts * size
            assert product.read_bytes == size
