"""Layers in fewer operators: the states of their own code, and when that is called instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastvlm.language import SplitDecoder, fused, general, split_decoder

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "one head of keys": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "num_key_value_heads": 1})
    ),
    "as many heads": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 4})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=6, query_pre_attn_scalar=30)
    ),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(3)
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


@torch.no_grad()
def states(decoder: SplitDecoder) -> list[Tensor]:
    """Return the states of a prompt, of steps and of verifies, of rows side by side and apart."""
    cache = decoder.cache(2, 64)
    tokens = torch.arange(2 * 40).view(2, 40) % 90 + 1
    found = []
    for starts, width in (([0, 0], 9), ([9, 9], 1), ([10, 10], 5), ([15, 12], 1), ([16, 13], 4)):
        x = decoder.embed(tokens[:, :width])
        positions = cache.positions(starts, width)
        found.append(decoder.forward_layers(x, positions, cache, range(decoder.depth)))
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers that were computed here."""
    layers: list[nn.Module] = []

    def noted(layer: nn.Module, *rest: Any) -> Tensor:
        layers.append(layer)
        return fused.run_layer(layer, *rest)

    monkeypatch.setattr(general, "run_layer", noted)
    return layers


def own(decoder: SplitDecoder, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(general, "layer_inputs", lambda *_: None)
        return states(decoder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_the_layers_own_code(
    name: str, dtype: torch.dtype, run: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(name, dtype)
    decoder = split_decoder(model)
    expected = own(decoder, monkeypatch)
    run.clear()
    found = states(decoder)
    assert len(run) == 5 * decoder.depth
    # Norms compute in float32, whatever the precision.
    error = 0.1 if dtype == torch.bfloat16 else 1e-4
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one - other).abs().max() < error * other.abs().max()


def test_other_code_is_called_as_it_is(run: list[nn.Module]) -> None:
    torch.manual_seed(0)
    config = SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0])
    states(split_decoder(model := SmolLM3ForCausalLM(config).eval()))
    assert model
    assert not run


def hooked(part: nn.Module) -> None:
    part.register_forward_hook(lambda _, __, found: found)


def wrapped(part: nn.Module) -> None:
    part.forward = partial(part.forward)


class OtherNorm(nn.LayerNorm):
    pass


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook on a layer": hooked,
    "a hook on attention": lambda layer: hooked(layer.self_attn),
    "a hook on a feed-forward part": lambda layer: hooked(layer.mlp),
    "a hook on a norm": lambda layer: hooked(layer.post_attention_layernorm),
    "another forward": lambda layer: wrapped(layer.self_attn),
    "another norm": lambda layer: setattr(layer, "input_layernorm", OtherNorm(48)),
    "another second norm": lambda layer: setattr(layer, "post_attention_layernorm", OtherNorm(48)),
    "dropout": lambda layer: layer.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_called_as_it_is(change: str, run: list[nn.Module]) -> None:
    model = made("llama")
    decoder = split_decoder(model)
    run.clear()
    CHANGES[change](decoder.layers[1])
    states(decoder)
    assert decoder.layers[0] in run
    assert decoder.layers[1] not in run


def test_hooks_of_linear_layers_are_called(run: list[nn.Module]) -> None:
    model = made("qwen3")
    decoder, seen = split_decoder(model), []
    run.clear()
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.act_fn"):
        part = decoder.layers[0].get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
    states(decoder)
    assert decoder.layers[0] in run
    assert len(seen) == 5 * 4


def test_gradients_and_autocast_are_left_to_the_layers() -> None:
    model = made("qwen2")
    decoder = split_decoder(model).decoder
    x, rotations = torch.randn(1, 4, 48), (torch.ones(1, 4, 12), torch.zeros(1, 4, 12))
    given = {"position_embeddings": rotations, "attention_mask": None, "layer_past": object()}
    assert fused.layer_inputs(decoder, x, given) is None
    with torch.no_grad():
        assert fused.layer_inputs(decoder, x, given) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert fused.layer_inputs(decoder, x, given) is None
        assert fused.layer_inputs(decoder, x, {**given, "encoder_hidden_states": x}) is None


def test_another_attention_is_left_to_the_layers(run: list[nn.Module]) -> None:
    model = made("llama")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    decoders = [split_decoder(one) for one in (model, eager)]
    run.clear()
    states(decoders[1])
    AttentionInterface.register("sdpa", partial(sdpa_attention_forward))
    try:
        states(decoders[0])
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert not run
    states(decoders[0])
    assert run
