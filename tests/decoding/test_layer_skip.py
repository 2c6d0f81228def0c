"""Drafting with some of the target's layers, and the search for those to skip."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from fastvlm.decoding import Autoregressive, LayerSkip, Request
from fastvlm.decoding.layer_search import (
    SampleReplies,
    StepCosts,
    expected_speedup,
    find_skipped_layers,
    measured_costs,
)
from fastvlm.decoding.layer_skip import default_skipped_layers
from fastvlm.drafting import AdaptiveLength, ConfidenceLength, FixedLength
from fastvlm.functional.errors import InputError
from fastvlm.language import split_decoder
from tests.decoding.conftest import FAMILIES, decode, generate, inputs_of, text_model

PROMPTS = [[5, 9, 33, 7], [11, 12, 11, 12, 11], [40, 3, 8, 60, 21, 22, 23, 50, 51], [6]]
COSTS = StepCosts(layer=1.0, head=0.5, verify=6.0, slope=0.1)
LENGTHS = {
    "fixed": FixedLength(3),
    "confidence": ConfidenceLength(5, 0.3),
    "adaptive": AdaptiveLength(6),
}


def samples(model: PreTrainedModel, limit: int = 30) -> list[Request]:
    return [Request(inputs_of(model, prompt), Autoregressive(), limit) for prompt in PROMPTS]


@torch.no_grad()
def make_identity(model: PreTrainedModel, layer: int) -> None:
    """Make a layer return what it was given, by what it adds to it."""
    block = model.get_decoder().layers[layer]
    block.self_attn.o_proj.weight.zero_()
    block.mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_generates(family: str) -> None:
    model = text_model(family)
    drafter = LayerSkip(split_decoder(model), (1, 3), FixedLength(4))
    expected = [generate(model, prompt, 24) for prompt in PROMPTS]
    ends = frozenset({1})
    alone = [
        decode(model, drafter, [p], 24, end_token_ids=ends)[0].output_token_ids for p in PROMPTS
    ]
    assert alone == expected
    together = decode(model, drafter, PROMPTS, 24, end_token_ids=ends)
    assert [request.output_token_ids for request in together] == expected


@pytest.mark.parametrize("length", LENGTHS)
def test_tokens_are_the_same_with_every_draft_length(length: str) -> None:
    model = text_model("qwen2")
    drafter = LayerSkip(split_decoder(model), (1, 3), LENGTHS[length])
    for rows in (1, 4):
        found = decode(model, drafter, PROMPTS[:rows], 40)
        plain = [generate(model, p, 40, eos_token_id=None) for p in PROMPTS[:rows]]
        assert [request.output_token_ids for request in found] == plain


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_with_all_layers_everything_is_accepted(family: str) -> None:
    model = text_model(family)
    drafter = LayerSkip(split_decoder(model), (), FixedLength(5))
    for request in decode(model, drafter, PROMPTS, 30):
        assert request.accepted == request.proposed
        assert sum(request.proposed) > 0


def test_a_layer_that_does_nothing_can_be_skipped() -> None:
    model = text_model("qwen2")
    make_identity(model, 3)
    for request in decode(model, LayerSkip(split_decoder(model), (3,)), PROMPTS, 30):
        assert request.accepted == request.proposed


@pytest.mark.parametrize(
    ("skipped", "message"), [((5,), "0 to 4; got 5"), ((-1,), "got -1"), (range(5), "All 5 layers")]
)
def test_impossible_layers_are_refused(skipped: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LayerSkip(split_decoder(text_model("llama")), skipped)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 16, 24, 32])
def test_the_default_keeps_the_first_and_the_last_layer(depth: int) -> None:
    skipped = default_skipped_layers(depth)
    assert bool(skipped) == (depth > 2)
    assert not {0, depth - 1} & set(skipped)
    assert len(skipped) <= (depth + 2) // 4 + 1


@pytest.mark.parametrize("family", ["qwen2", "mistral-sliding"])
@pytest.mark.parametrize("skipped", [(), (1,), (2, 3)])
@torch.inference_mode()
def test_one_pass_judges_what_each_draft_would_begin_with(
    family: str, skipped: tuple[int, ...]
) -> None:
    model = text_model(family)
    decoder = split_decoder(model)
    requests = samples(model, 12)
    found = SampleReplies(decoder, requests).acceptance(skipped)
    kept = [layer for layer in range(decoder.depth) if layer not in skipped]
    right = total = 0
    for request in requests:
        tokens = request.prompt_token_ids + request.output_token_ids
        for place in range(len(request.prompt_token_ids), len(tokens) - 1):
            cache = decoder.cache(1, place + 1)
            before = torch.tensor([tokens[:place]])
            places, layers = cache.positions([0], place), range(decoder.depth)
            decoder.forward_layers(decoder.embed(before), places, cache, layers)
            x = decoder.embed(torch.tensor([[tokens[place]]]))
            x = decoder.forward_layers(x, cache.positions([place], 1), cache, kept)
            right += int(decoder.head(x).argmax()) == tokens[place + 1]
            total += 1
    assert found == right / total


@pytest.mark.parametrize("redundant", [(2,), (1, 3)])
def test_the_search_finds_redundant_layers(redundant: tuple[int, ...]) -> None:
    model = text_model("qwen2")
    for layer in redundant:
        make_identity(model, layer)
    choice = find_skipped_layers(split_decoder(model), samples(model), costs=COSTS)
    assert choice.skipped == redundant
    assert choice.acceptance == 1
    drafter = LayerSkip(split_decoder(model), choice.skipped)
    for request in decode(model, drafter, PROMPTS, 30):
        assert request.accepted == request.proposed


def test_a_search_says_what_it_needs() -> None:
    model = text_model("qwen2")
    with pytest.raises(InputError, match="two tokens"):
        find_skipped_layers(split_decoder(model), samples(model, 1), costs=COSTS)
    with pytest.raises(InputError, match="tries 3 sets of layers; got 2"):
        find_skipped_layers(split_decoder(model), samples(model), costs=COSTS, evaluations=2)
    first_round = find_skipped_layers(
        split_decoder(model), samples(model), costs=COSTS, evaluations=4
    )
    assert len(first_round.skipped) == 1


def test_the_expected_speedup_is_that_of_the_best_length() -> None:
    # All accepted: 25 tokens for 24 draft steps of two layers and the head, and a verify.
    expected = 25 * 5.5 / (24 * 2.5 + 6.0 + 23 * 0.1)
    assert expected_speedup(1.0, 2, 5, COSTS) == pytest.approx(expected)
    # None accepted: one token for the shortest draft.
    assert expected_speedup(0.0, 2, 5, COSTS) == pytest.approx(5.5 / (2.5 + 6.0))


def test_costs_are_measured() -> None:
    model = text_model("llama")
    costs = measured_costs(split_decoder(model), 20)
    assert costs.layer > 0
    assert costs.head > 0
    assert costs.verify > costs.layer
    assert costs.slope >= 0
