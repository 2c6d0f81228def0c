"""Models that are offloaded, quantised, or attend in another way."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from fastvlm.decoding import SelfSpeculative
from fastvlm.functional.errors import InputError
from fastvlm.language import capture_decoder_inputs, split_decoder
from tests.families import FAMILIES, replies
from tests.language.decoding import LIMIT, STRATEGIES, decode, network, strategy

KINDS = ("llama", "qwen2.5-vl", "blip2-opt", "blip2-t5")


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("name", ["prompt-lookup", "block"])
def test_eager_attention(family: str, name: str) -> None:
    model, inputs = FAMILIES[family]()
    given = inputs(4)
    # With it, padding makes transformers' own float64 no number.
    expected = replies(model, given, LIMIT)
    model.set_attn_implementation("eager")
    decoder = split_decoder(model)
    found = decode(decoder, strategy(name, decoder), capture_decoder_inputs(model, given))
    assert [request.output_token_ids for request in found] == expected


def test_another_attention_is_refused() -> None:
    model, inputs = FAMILIES["llama"]()
    prompts = capture_decoder_inputs(model, inputs(1))
    decoder = split_decoder(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="flex_attention"):
        decode(decoder, strategy("autoregressive", decoder), prompts)


@pytest.mark.parametrize("family", KINDS)
def test_weights_that_are_fetched_when_they_are_needed(family: str) -> None:
    model, inputs = FAMILIES[family]()
    given = inputs(2)
    expected = replies(model, given, LIMIT)
    # As `dispatch_model` leaves a model of which parts lie on another device or on disk.
    cpu_offload(model, execution_device=torch.device("cpu"))
    decoder = split_decoder(model)
    assert decoder.lm_head.weight.is_meta
    assert (decoder.device, decoder.dtype) == (torch.device("cpu"), torch.float64)
    for name in ("autoregressive", "early-exit", "block"):
        found = decode(decoder, strategy(name, decoder), capture_decoder_inputs(model, given))
        assert [request.output_token_ids for request in found] == expected
    assert decoder.lm_head_rows(torch.tensor([1])) is None


class Int8Linear(nn.Module):
    """A layer whose weights are whole numbers, as libraries of quantisation have them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().char(), requires_grad=False)
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale.to(x.dtype), self.bias)


@torch.no_grad()
def quantise(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))


@pytest.mark.parametrize("family", ["llama", "qwen2.5-vl", "blip2-opt"])
def test_quantised_weights(family: str) -> None:
    model, inputs = FAMILIES[family]()
    decoder = split_decoder(model)
    quantise(decoder.decoder)
    owner = model.language_model if family == "blip2-opt" else model
    owner.lm_head = Int8Linear(owner.lm_head)
    given = inputs(2)
    expected = replies(model, given, LIMIT)
    decoder = split_decoder(model)
    assert (decoder.device, decoder.dtype) == (torch.device("cpu"), torch.float64)
    for name in ("autoregressive", "early-exit", "block"):
        found = decode(decoder, strategy(name, decoder), capture_decoder_inputs(model, given))
        assert [request.output_token_ids for request in found] == expected
    assert decoder.lm_head_rows(torch.tensor([1])) is None


@pytest.mark.parametrize("family", KINDS)
def test_int8_weights_of_torchao(family: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = FAMILIES[family]()
    given = {
        name: value.float() if value.is_floating_point() else value
        for name, value in inputs(2).items()
    }
    quantization.quantize_(model.float(), quantization.Int8WeightOnlyConfig())
    expected = replies(model, given, LIMIT)
    decoder = split_decoder(model)
    restricted = SelfSpeculative(decoder, 1, network(decoder, "block", vocabulary=range(3, 60)))
    for drafts in (*(strategy(name, decoder) for name in STRATEGIES[:4]), restricted):
        found = decode(decoder, drafts, capture_decoder_inputs(model, given))
        assert [request.output_token_ids for request in found] == expected


def test_weights_that_are_kept_in_float32() -> None:
    model, inputs = FAMILIES["blip2-t5"]()
    model.half()
    decoder = split_decoder(model)
    for layer in decoder.layers:
        layer.layer[-1].DenseReluDense.wo.float()
    given = {
        name: value.half() if value.is_floating_point() else value
        for name, value in inputs(1).items()
    }
    expected = replies(model, given, LIMIT)
    found = decode(
        decoder, strategy("autoregressive", decoder), capture_decoder_inputs(model, given)
    )
    assert [request.output_token_ids for request in found] == expected
    assert decode(decoder, strategy("early-exit", decoder), capture_decoder_inputs(model, given))[
        0
    ].output_token_ids
