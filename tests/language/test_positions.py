"""Positions at and beyond what a model was made for: as transformers' own generate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fastvlm.decoding import Engine, Request
from fastvlm.functional.errors import InputError
from fastvlm.language import DecoderInputs, SplitDecoder, split_decoder
from tests.families import text
from tests.language.decoding import STRATEGIES, decode, strategy

FACTORS = 4
"""Frequencies of a head of the small models."""
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 7.0],
    "original_max_position_embeddings": 24,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


def prompt(length: int) -> list[int]:
    return [(7 * length + 5 * place + place * place) % 90 + 3 for place in range(length)]


def model_of(rope: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    """A Llama whose replies are as long as they may be."""
    given = {} if rope is None else {"rope_parameters": dict(rope)}
    model, _ = text("llama", eos_token_id=None, **given, **options)
    model.generation_config.eos_token_id = None
    return model


def generated(model: PreTrainedModel, tokens: list[int], limit: int, **options: Any) -> list[int]:
    row = torch.tensor([tokens])
    mask = torch.ones_like(row)
    # Its dynamic rotations remember the longest sequence of all calls; a copy has seen none.
    out = copy.deepcopy(model).generate(
        input_ids=row, attention_mask=mask, max_new_tokens=limit, do_sample=False, **options
    )
    return out[0, len(tokens) :].tolist()


@torch.no_grad()
def inputs_of(decoder: SplitDecoder, tokens: list[int]) -> DecoderInputs:
    return DecoderInputs(tokens, decoder.embed(torch.tensor(tokens)), keys=[*tokens])


def decoded(
    model: PreTrainedModel, name: str, prompts: list[list[int]], limit: int
) -> list[Request]:
    """Requests of prompts that were decoded together."""
    decoder = split_decoder(model)
    inputs = [inputs_of(decoder, tokens) for tokens in prompts]
    return decode(decoder, strategy(name, decoder), inputs, limit, ends=())


def check(model: PreTrainedModel, name: str, lengths: list[int], limit: int) -> None:
    """Compare replies, alone and together, with those that transformers gives one by one."""
    prompts = [prompt(length) for length in lengths]
    expected = [generated(model, tokens, limit) for tokens in prompts]
    assert all(len(reply) == limit and len({*reply}) > 4 for reply in expected)
    found = decoded(model, name, prompts, limit)
    assert [request.output_token_ids for request in found] == expected
    if name == "perfect":
        assert all(request.accepted == request.proposed for request in found)
    for tokens, reply in zip(prompts, expected, strict=True):
        assert decoded(model, name, [tokens], limit)[0].output_token_ids == reply


@pytest.mark.parametrize("name", STRATEGIES)
def test_longrope_across_the_switch_of_factors(name: str) -> None:
    """Prompts below, at and above the switch; one of several drafted tokens crosses it."""
    model = model_of(LONGROPE, max_position_embeddings=96)
    assert len(model.model.rotary_emb.original_inv_freq) == FACTORS
    check(model, name, [12, 19, 20, 21, 23, 24, 25, 40], 24)


def test_the_switch_of_factors_changes_tokens() -> None:
    """Otherwise the test above would show nothing."""
    model = model_of(LONGROPE, max_position_embeddings=96)
    short = model_of(
        {**LONGROPE, "long_factor": LONGROPE["short_factor"]}, max_position_embeddings=96
    )
    assert generated(model, prompt(12), 24) != generated(short, prompt(12), 24)


@pytest.mark.parametrize("name", STRATEGIES)
def test_dynamic_scaling_beyond_the_original_length(name: str) -> None:
    model = model_of(DYNAMIC, max_position_embeddings=32)
    assert split_decoder(model).context == 64
    check(model, name, [20, 31, 33, 43], 40)


@pytest.mark.parametrize("original", [{}, {"original_max_position_embeddings": 32}])
@pytest.mark.parametrize("name", ["autoregressive", "perfect", "prompt-lookup"])
def test_yarn_whose_configuration_keeps_the_unscaled_length(
    name: str, original: dict[str, int]
) -> None:
    model = model_of({**YARN, **original}, max_position_embeddings=32)
    assert split_decoder(model).context == 128
    check(model, name, [20, 43], 40)


def test_yarn_whose_configuration_has_the_scaled_length() -> None:
    scaled = {**YARN, "original_max_position_embeddings": 32}
    model = model_of(scaled, max_position_embeddings=128)
    assert split_decoder(model).context == 128
    check(model, "perfect", [43], 40)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_reply_beyond_what_the_model_was_made_for(name: str) -> None:
    check(model_of(max_position_embeddings=64), name, [43, 50], 40)


@pytest.mark.parametrize("length", [64, 65, 90])
def test_a_prompt_that_fills_the_context_is_refused(length: int) -> None:
    model = model_of(max_position_embeddings=64)
    decoder = split_decoder(model)
    drafts = strategy("autoregressive", decoder)
    requests = [Request(inputs_of(decoder, prompt(n)), drafts, 5) for n in (length, 63)]
    finished = list(Engine(decoder).run(requests))
    assert {*finished} == {*requests}
    assert isinstance(requests[0].error, InputError)
    assert f"{length} tokens" in str(requests[0].error)
    assert "64" in str(requests[0].error)
    assert requests[1].output_token_ids == generated(model, prompt(63), 5)


def test_a_prompt_that_fills_a_scaled_context_is_refused() -> None:
    model = model_of(YARN, max_position_embeddings=32)
    with pytest.raises(InputError, match="context is 128"):
        decoded(model, "autoregressive", [prompt(128)], 5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_autocast_around_a_call(name: str) -> None:
    """In it as generate in it, and after it as before."""
    model = model_of().float()
    prompts = [prompt(9), prompt(14)]
    limit = 12
    usual = [generated(model, tokens, limit) for tokens in prompts]
    assert [one.output_token_ids for one in decoded(model, name, prompts, limit)] == usual
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [generated(model, tokens, limit) for tokens in prompts]
        for tokens, reply in zip(prompts, mixed, strict=True):
            [request] = decoded(model, name, [tokens], limit)
            assert request.output_token_ids == reply
    assert [one.output_token_ids for one in decoded(model, name, prompts, limit)] == usual


def test_a_request_computes_as_the_thread_that_added_it() -> None:
    """Requests inside and outside of autocast share an engine, and no precision."""
    model = model_of().float()
    decoder = split_decoder(model)
    engine, drafts = Engine(decoder), strategy("autoregressive", decoder)
    seen: set[torch.dtype] = set()

    def note(_: nn.Module, __: object, output: torch.Tensor) -> None:
        seen.add(output.dtype)

    plain = Request(inputs_of(decoder, prompt(9)), drafts, 8)
    mixed = Request(inputs_of(decoder, prompt(9)), drafts, 8)
    engine.add(plain)
    with torch.autocast("cpu", torch.bfloat16):
        engine.add(mixed)
        expected = generated(model, prompt(9), 8)
    with model.model.layers[0].mlp.down_proj.register_forward_hook(note):
        while not (plain.finished and mixed.finished):
            engine.step()
    assert seen == {torch.float32, torch.bfloat16}
    assert mixed.output_token_ids == expected
    assert plain.output_token_ids == generated(model, prompt(9), 8)
