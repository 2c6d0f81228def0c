"""Quantised and packed targets of newer families decode to the tokens of their own generate."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.functional.products import available
from fastvlm.language import (
    SplitDecoder,
    capture_decoder_inputs,
    split_decoder,
)
from fastvlm.language.packed import pack_decoder
from tests.families import NEWER, Inputs, replies
from tests.families.releases import released
from tests.language.decoding import LIMIT, decode, network, pack_small, strategy
from tests.language.test_placement import Int8Linear, quantise

FAMILIES = released(
    dict.fromkeys(
        (
            "cohere2",
            "gemma3",
            "gpt-oss",
            "granite",
            "granite4-vision",
            "llama4",
            "mllama",
            "mt5",
            "phi3",
            "qwen3-moe",
            "qwen3-vl",
            "t5gemma",
        )
    )
)
STRATEGIES = ("autoregressive", "early-exit", "block", "perfect", "mlp")


def check(model: PreTrainedModel, given: Inputs) -> None:
    """Hold every strategy against generate, and the draft that is the target to full acceptance."""
    expected = replies(model, given, LIMIT)
    decoder = split_decoder(model)
    prompts = capture_decoder_inputs(model, given)
    for name in STRATEGIES:
        found = decode(decoder, strategy(name, decoder), prompts)
        assert [request.output_token_ids for request in found] == expected
        if name == "perfect":
            assert all(request.accepted == request.proposed for request in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_weights(family: str) -> None:
    model, inputs = NEWER[family]()
    given = inputs(4)
    before = replies(model, given, LIMIT)
    quantise(model)
    check(model, given)
    assert replies(model, given, LIMIT) != before


def in_float32(given: Inputs) -> Inputs:
    return {
        name: value.float() if value.is_floating_point() else value for name, value in given.items()
    }


@pytest.mark.skipif(not available(), reason="This CPU packs no weights.")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_small(monkeypatch)
    model, inputs = NEWER[family]()
    given = in_float32(inputs(4))
    expected = replies(model.float(), given, LIMIT)
    assert pack_decoder(model) > 0
    assert replies(model, given, LIMIT) == expected
    check(model, given)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_of_torchao(family: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = NEWER[family]()
    given = in_float32(inputs(4))
    quantization.quantize_(model.float(), quantization.Int8WeightOnlyConfig())
    check(model, given)


def difference(decoder: SplitDecoder, plain: SplitDecoder, kind: str) -> float:
    """Return how far a draft that starts from a model lies from one of a plain model."""
    made = [network(each, kind, perfect=True).state_dict() for each in (decoder, plain)]
    assert made[0].keys() == made[1].keys()
    return max(float((made[0][name] - made[1][name]).abs().max()) for name in made[1])


@pytest.mark.parametrize("kind", ["block", "mlp"])
@pytest.mark.parametrize("family", ["gemma3", "mllama", "phi3", "qwen3-moe", "t5gemma"])
def test_a_draft_starts_from_what_quantised_weights_stand_for(family: str, kind: str) -> None:
    model, _ = NEWER[family]()
    plain = copy.deepcopy(model)
    quantise(model)
    for name, part in model.named_modules():
        if isinstance(part, Int8Linear):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(part.weight * part.scale)
    assert difference(split_decoder(model), split_decoder(plain), kind) < 1e-12


@pytest.mark.parametrize("kind", ["block", "mlp"])
def test_a_draft_starts_from_adapted_weights(kind: str) -> None:
    model, _ = NEWER["granite"]()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"])
    config.init_lora_weights = False
    adapted = peft.get_peft_model(model, config).eval()
    decoder = split_decoder(adapted.get_base_model())
    started = network(decoder, kind, perfect=True)
    plain = split_decoder(adapted.merge_and_unload())
    for name, value in network(plain, kind, perfect=True).state_dict().items():
        torch.testing.assert_close(started.state_dict()[name], value)


@pytest.mark.parametrize("kind", ["block", "mlp"])
def test_a_draft_does_not_start_from_weights_that_are_elsewhere(kind: str) -> None:
    model, _ = NEWER["granite"]()
    cpu_offload(model, execution_device=torch.device("cpu"))
    decoder = split_decoder(model)
    with pytest.raises(InputError, match="offloaded"):
        network(decoder, kind, perfect=True)
