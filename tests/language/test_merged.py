"""Layers of the same input as one product: what each of them makes of it, and what ends that."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fastvlm.decoding import Autoregressive, SelfSpeculative
from fastvlm.functional.merged import MergedProduct, OwnProduct, merge, products
from fastvlm.functional.packed import PackedLinear, available
from fastvlm.functional.products import half_functions, packs
from fastvlm.language import split_decoder
from fastvlm.language.decoder_inputs import DecoderInputs
from fastvlm.language.packed import pack_decoder, pack_layers
from tests.language.decoding import decode, network, pack_small
from tests.language.test_fused import MODELS, made, states

PLENTY = 2**30
ROWS = (1, 2, 5, 6, 16, 40)

pytestmark = pytest.mark.skipif(
    not available() or half_functions() is None, reason="this CPU packs no weights in 16 bits"
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_small(monkeypatch)
    monkeypatch.setattr("fastvlm.functional.products.half_gains", lambda: True)


def layers(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> list[nn.Linear]:
    """Three layers of the same input, with values that float16 has too."""
    torch.manual_seed(2)
    found = [nn.Linear(256, out, bias=bias) for out in (128, 64, 200)]
    with torch.no_grad():
        for layer in found:
            layer.weight.copy_(layer.weight.bfloat16())
    return [layer.to(dtype) for layer in found]


def merged(found: list[nn.Linear], *, twice: bool = True) -> list[nn.Linear]:
    assert merge(found, PLENTY, twice=twice) > 0
    assert all(isinstance(layer, PackedLinear) for layer in found)
    return found


DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not packs(torch.bfloat16), reason="no bfloat16 on this CPU"),
    ),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call for the products of merged layers, whether they were one."""
    seen = []
    call = MergedProduct.__call__

    def noted(self: MergedProduct, *given: Any) -> Any:
        found = call(self, *given)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(MergedProduct, "__call__", noted)
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_products_are_those_of_float64(dtype: torch.dtype, bias: bool, calls: list[bool]) -> None:
    found = merged(layers(dtype, bias=bias))
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    for rows in ROWS:
        x = torch.randn(2, rows, 256).to(dtype)
        for layer, product in zip(found, products(found, x), strict=True):
            exact = x.double() @ layer.weight.double().T
            exact = exact + layer.bias.double() if bias else exact
            assert product.dtype == dtype
            assert product.shape == exact.shape
            assert (product - exact).abs().max() < rounding * exact.abs().max()
    assert calls == [True] * len(ROWS)


@torch.no_grad()
def test_a_layer_by_itself_is_packed_when_it_is_called() -> None:
    found, x = merged(layers(bias=True)), torch.randn(3, 256)
    together = products(found, x)
    for layer, product in zip(found, together, strict=True):
        own: Any = layer
        assert isinstance(own.packed.product, OwnProduct)
        assert own.packed.product.nbytes == 0
        assert torch.equal(layer(x), product)
        assert own.packed.product.nbytes == 2 * layer.weight.numel()
    for one in zip(together, products(found, x), strict=True):
        assert torch.equal(*one)


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "its data in place": lambda layer: layer.weight.data.mul_(2),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight)),
    "its bias": lambda layer: layer.bias.add_(1),
    "hooked": lambda layer: layer.register_forward_hook(lambda *given: given[2] + 1),
    "hooked before": lambda layer: layer.register_forward_pre_hook(lambda _, given: given[0] + 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("number", range(3))
@torch.no_grad()
def test_a_changed_layer_is_seen(change: str, number: int) -> None:
    found, x = merged(layers(bias=True)), torch.randn(2, 256)
    plain = layers(bias=True)
    products(found, x)
    for group in (found, plain):
        CHANGES[change](group[number])
    for _ in range(2):
        for one, layer in zip(products(found, x), plain, strict=True):
            torch.testing.assert_close(one, layer(x))


@torch.no_grad()
def test_another_layer_in_the_place_of_one_is_called() -> None:
    found, x = merged(layers()), torch.randn(2, 256)
    other = [found[0], nn.Sequential(found[1]), found[2]]
    for one, layer in zip(products(other, x), layers(), strict=True):
        torch.testing.assert_close(one, layer(x))


def test_copies_are_ordinary_layers() -> None:
    found = merged(layers())
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert all(type(layer) is nn.Linear for layer in other)


def test_only_what_gains_and_fits_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(layer.weight.numel() * 2 for layer in layers())
    # Once as one, and once each by itself.
    assert merge(layers(), 4 * size - 1, twice=False) == 0
    assert merge(layers(), 4 * size, twice=False) == size
    assert merge([*layers(), nn.Linear(256, 8)], PLENTY, twice=True) == 0
    assert merge([*layers(), nn.Identity()], PLENTY, twice=True) == 0
    whole = layers()
    nn.init.normal_(whole[1].weight)
    assert merge(whole, PLENTY, twice=True) == 0
    if packs(torch.bfloat16):
        assert merge(layers(torch.bfloat16), PLENTY, twice=False) == 0
    monkeypatch.setattr("fastvlm.functional.products.SMALLEST_OF_SEVERAL", PLENTY)
    assert merge(layers(), PLENTY, twice=True) == 0


def short(name: str) -> PreTrainedModel:
    """A model with values that bfloat16 has too."""
    return made(name, torch.bfloat16).float()


@pytest.mark.parametrize("name", MODELS)
def test_states_of_decoders_are_those_of_plain_weights(name: str, calls: list[bool]) -> None:
    model = short(name)
    expected = states(split_decoder(model))
    assert pack_decoder(model) > 0
    calls.clear()
    decoder = split_decoder(model)
    found = states(decoder)
    assert calls.count(True) >= 5 * 2 * decoder.depth
    assert all(calls)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "qwen3"])
@torch.no_grad()
def test_drafts_are_merged_too_and_tokens_are_those_of_generate(name: str) -> None:
    model = short(name)
    tokens = torch.arange(1, 9).view(2, 4)
    expected = model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert pack_decoder(model) > 0
    decoder = split_decoder(model)
    block = network(decoder, "block").bfloat16().float()
    assert pack_layers([block]) > 0
    prompts = [DecoderInputs(row.tolist(), decoder.embed(row[None])[0]) for row in tokens]
    for drafts in (Autoregressive(), SelfSpeculative(decoder, 1, block)):
        found = decode(decoder, drafts, prompts, limit=12, ends=())
        assert [request.output_token_ids for request in found] == expected[:, 4:].tolist()
