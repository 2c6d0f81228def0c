"""Packed weights: the same products, told from float64's, and what ends them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import parametrize

import fastvlm
from fastvlm.decoding import Autoregressive
from fastvlm.language import capture_decoder_inputs, split_decoder
from fastvlm.language.packed import SMALLEST, PackedLinear, available, pack
from tests.families import FAMILIES, replies
from tests.language.decoding import LIMIT, decode, strategy

WIDTH = 512
PLENTY = 2**30

pytestmark = pytest.mark.skipif(not available(), reason="this CPU packs no weights")


def linear(out: int = WIDTH, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, out, bias=bias, dtype=dtype)


def packed(layer: nn.Linear) -> nn.Linear:
    assert pack([layer], PLENTY) == layer.weight.nbytes
    assert isinstance(layer, PackedLinear)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 5), (3, 1), (2, 11), (1, 16), (4, 33), (7,)])
def test_products_are_those_of_float64(shape: tuple[int, ...], bias: bool) -> None:
    layer = packed(linear(700, bias=bias))
    x = torch.randn(*shape, WIDTH)
    exact = x.double() @ layer.weight.double().T
    if bias:
        exact = exact + layer.bias.double()
    with torch.inference_mode():
        found = layer(x)
    assert found.shape == (*shape, 700)
    assert (found - exact).abs().max() < 1e-5


def test_rows_that_lie_apart_in_memory() -> None:
    layer, x = packed(linear()), torch.randn(3, 8, WIDTH)[:, 2:6]
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x.contiguous()))


def test_gradients_are_the_ordinary_ones() -> None:
    plain, layer, x = linear(), packed(linear()), torch.randn(5, WIDTH)
    for one in (plain, layer):
        one(x).square().sum().backward()
    assert torch.equal(plain.weight.grad, layer.weight.grad)


def test_autocast_is_the_ordinary_one() -> None:
    plain, layer, x = linear(), packed(linear()), torch.randn(5, WIDTH)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x.bfloat16())
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, plain(x))


def test_only_what_gains_is_packed() -> None:
    short, double = linear(dtype=torch.bfloat16), linear(dtype=torch.float64)
    small, offloaded = linear(SMALLEST // WIDTH - 1), linear()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    changed = linear()
    parametrize.register_parametrization(changed, "weight", nn.Identity())
    assert pack([short, double, small, offloaded, changed], PLENTY) == 0


def test_elsewhere_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear()
    for capability, onednn in (("DEFAULT", True), ("SVE256", True), ("AVX2", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda it=capability: it)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda it=onednn: it)
        assert pack([layer], PLENTY) == 0
    assert type(layer) is nn.Linear


def test_memory_is_bounded_and_nothing_is_packed_twice() -> None:
    layers = [linear() for _ in range(4)]
    size = layers[0].weight.nbytes
    assert pack(layers, 2 * size + 1) == 2 * size
    assert [isinstance(layer, PackedLinear) for layer in layers] == [True, True, False, False]
    assert pack(layers, PLENTY) == 2 * size
    assert pack([nn.Sequential(*layers)], PLENTY) == 0


def test_copies_are_ordinary_layers() -> None:
    layer, x = packed(linear()), torch.randn(1, WIDTH)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is nn.Linear
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(other(x), layer(x))
    assert layer.state_dict().keys() == linear().state_dict().keys()


@pytest.mark.parametrize("way", ["in place", "replaced", "loaded", "moved"])
def test_changed_weights_are_seen(way: str) -> None:
    layer, x = packed(linear()), torch.randn(4, WIDTH)
    weight = 2 * layer.weight.detach()
    with torch.no_grad():
        if way == "in place":
            layer.weight.mul_(2)
        elif way == "replaced":
            layer.weight.data = weight
        elif way == "loaded":
            layer.load_state_dict({"weight": weight, "bias": layer.bias})
        else:
            weight = layer.to(torch.bfloat16).weight
            x = x.bfloat16()
        assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("family", ["llama", "qwen2.5-vl", "blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("name", ["autoregressive", "lookup", "block"])
def test_tokens_are_those_of_generate(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = FAMILIES[family]()
    model.float()
    given = {
        key: value.float() if value.is_floating_point() else value
        for key, value in inputs(4).items()
    }
    expected = replies(model, given, LIMIT)
    prompts = capture_decoder_inputs(model, given)
    # The models of the tests are small.
    monkeypatch.setattr("fastvlm.language.packed.SMALLEST", 1)
    assert fastvlm.pack_decoder(model) > 0
    decoder = split_decoder(model)
    found = decode(decoder, strategy(name, decoder), prompts)
    assert [request.reply for request in found] == expected
    assert decode(decoder, Autoregressive(), prompts)[0].reply == expected[0]


def test_load_packs_as_much_as_it_is_told() -> None:
    vlm = fastvlm.load()
    head = vlm.decoder.lm_head
    assert isinstance(head, PackedLinear)
    most = head.weight.nbytes - 1
    for packed_bytes in (0, most):
        parts = fastvlm.load(packed_bytes=packed_bytes).model.modules()
        packed = [part for part in parts if isinstance(part, PackedLinear)]
        assert sum(part.weight.nbytes for part in packed) <= packed_bytes
