"""Weights in 8 and 4 bits: products told from float64's, and tokens of the model's own generate."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvlm
from fastvlm.functional.errors import InputError
from fastvlm.language import capture_decoder_inputs, quantised, split_decoder
from fastvlm.language.quantised import (
    LAYERS,
    Int4Linear,
    Int8Linear,
    most_activation,
    quantise,
    quantise_decoder,
)
from fastvlm_example.scenes import render, sample
from tests.families import FAMILIES, replies
from tests.language.decoding import LIMIT, decode, strategy

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is for x86 CPUs"
)
ERRORS = {"int8": 5e-4, "int4": 3e-2}
"""Of a product of what the weights stand for, beside its spread: of activations in 15 bits, and in
bfloat16."""
LOST = {"int8": 0.01, "int4": 0.1}
"""Of the weights themselves."""


def linear(rows: int, columns: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(rows)
    return nn.Linear(columns, rows, bias=bias)


@torch.no_grad()
@pytest.mark.parametrize("bits", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512, 256), (1552, 96), (272, 576)])
@pytest.mark.parametrize("most", [127, 63])
def test_products_are_those_of_float64(
    bits: str, bias: bool, shape: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "most_activation", lambda: most)
    layer = linear(*shape, bias=bias)
    made = LAYERS[bits].of(layer)
    weight = made.rows(torch.arange(shape[0]))
    assert (weight - layer.weight).norm() < LOST[bits] * layer.weight.norm()
    x = torch.randn(3, 11, shape[1])
    x[1, 4] *= 1e4
    x[0, 2] = 0
    exact = x.double() @ weight.double().T
    if bias:
        exact += layer.bias.double()
    found = made(x)
    assert found.dtype == x.dtype
    spread = x.norm(dim=-1, keepdim=True) * layer.weight.std() + 1e-2
    assert ((found - exact).abs() / spread).max() < ERRORS[bits] * (1 if most == 127 else 4)
    # A row is the same beside any others.
    for part in (x[:1, :1], x[1:, 3:9], x[2, 10]):
        assert torch.equal(made(part), found[find(x, part)])
    assert made(x.bfloat16()).dtype == torch.bfloat16
    assert made(x.double()).dtype == torch.float64


def find(x: Tensor, part: Tensor) -> Any:
    """Return where a part of a tensor lies in it."""
    for index in ((slice(1), slice(1)), (slice(1, None), slice(3, 9)), (2, 10)):
        if x[index].shape == part.shape and torch.equal(x[index], part):
            return index
    raise AssertionError


@pytest.mark.parametrize("bits", LAYERS)
def test_copies_and_pickles_compute_the_same(bits: str) -> None:
    made, x = LAYERS[bits].of(linear(512, 256)), torch.randn(3, 256)
    expected = made(x)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), expected)
    assert torch.equal(made.to(torch.bfloat16).to(torch.float32)(x), made(x))


def test_activations_in_7_bits_never_exceed_what_16_bits_hold() -> None:
    assert most_activation() in {63, 127}
    # Offset 64, so that a pair of products is at most 2 * 127 * 127.
    assert 2 * (2 * 63 + 1) * 127 < 2**15


def test_small_layers_and_those_of_others_stay() -> None:
    model = nn.Sequential(linear(32, 64), linear(512, 256), nn.Bilinear(4, 4, 4))
    double = nn.Sequential(model, model[1])
    assert quantise([double], "int8") == 1
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], Int8Linear)
    assert double[1] is model[1]
    odd = nn.Sequential(linear(512, 250), linear(513, 256), linear(512, 256))
    assert quantise([odd], "int4") == 1
    assert isinstance(odd[2], Int4Linear)
    with pytest.raises(InputError, match="no layer"):
        quantise([nn.Sequential(nn.Linear(256, 256, device="meta"))], "int8")


@pytest.mark.parametrize("bits", LAYERS)
@pytest.mark.parametrize("family", ["llama", "qwen2.5-vl", "blip2-opt", "blip2-t5"])
def test_tokens_are_those_of_the_quantised_models_generate(
    family: str, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "SMALLEST_WEIGHTS", 1)
    monkeypatch.setattr(quantised, "GROUP", 16)
    model, inputs = FAMILIES[family]()
    model.float()
    given = {
        key: value.float() if value.is_floating_point() else value
        for key, value in inputs(3).items()
    }
    before = replies(model, given, LIMIT)
    if bits == "int4":
        pytest.skip("the layers of the models of the tests are too small for groups")
    assert quantise_decoder(model, "int8") > 1
    expected = replies(model, given, LIMIT)
    assert expected != before or family != "llama"
    decoder = split_decoder(model)
    prompts = capture_decoder_inputs(model, given)
    for name in ("autoregressive", "prompt-lookup", "block", "early-exit"):
        found = decode(decoder, strategy(name, decoder), prompts)
        assert [request.output_token_ids for request in found] == expected


@pytest.mark.parametrize("bits", LAYERS)
def test_load_quantises_and_its_draft_drafts(bits: Any) -> None:
    vlm = fastvlm.load(quantize=bits, runtime="torch")
    layers = list(vlm.decoder.decoder.modules())
    assert sum(isinstance(part, LAYERS[bits]) for part in layers) > 100
    assert isinstance(vlm.decoder.lm_head, LAYERS[bits])
    assert isinstance(vlm.decoder.embedding.weight, nn.Parameter)
    rows = vlm.decoder.lm_head_rows(torch.tensor([3, 5]))
    assert rows is not None
    embedded = vlm.decoder.embedding.weight[[3, 5]]
    assert (rows - embedded).norm() < LOST[bits] * embedded.norm()
    question, image = "Describe the picture in one sentence.", render(sample(4), 320)
    found = [
        vlm.generate(question, image, strategy=name, max_new_tokens=24)
        for name in ("autoregressive", "imitation", "prompt-lookup")
    ]
    assert found[0].token_ids == found[1].token_ids == found[2].token_ids
    assert sum(found[1].drafted) > len(found[1].drafted) / 4


def test_load_names_what_it_knows() -> None:
    wrong: Any = "int3"
    with pytest.raises(InputError, match="int8 or int4"):
        fastvlm.load(quantize=wrong)
