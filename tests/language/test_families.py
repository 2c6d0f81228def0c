"""Every family of models decodes to the tokens of transformers' own generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from fastvlm.decoding import Autoregressive, Engine, Request
from fastvlm.decoding.layer_search import SampleReplies
from fastvlm.functional.errors import InputError
from fastvlm.language import capture_decoder_inputs, split_decoder
from fastvlm.language.generator import generator_of
from tests.families import END, FAMILIES, NEWER, NEWER_WITH_IMAGES, Inputs, replies, text
from tests.families.parts import FIRST_SPECIAL, together
from tests.language.decoding import LIMIT, STRATEGIES, decode, strategy

EVERY = {**FAMILIES, **NEWER}
SHOWN = list(NEWER_WITH_IMAGES)
"""Newer families that are decoded with images."""
ALONE = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in NEWER)]
LONG = 70
"""Positions of a prompt that is longer than any window, chunk or short context."""


@dataclass(frozen=True)
class Case:
    """A family's model, and what transformers makes of its inputs."""

    model: PreTrainedModel
    make: Callable[..., Inputs]
    inputs: dict[int, Inputs]
    expected: dict[int, list[list[int]]]


@cache
def case(family: str) -> Case:
    model, inputs = EVERY[family]()
    given = {rows: inputs(rows) for rows in (1, 4)}
    return Case(model, inputs, given, {rows: replies(model, given[rows], LIMIT) for rows in given})


def decoded(model: PreTrainedModel, inputs: Inputs, name: str) -> list[list[int]]:
    """Return what a strategy makes of inputs."""
    decoder = split_decoder(model)
    found = decode(decoder, strategy(name, decoder), capture_decoder_inputs(model, inputs))
    return [request.output_token_ids for request in found]


@pytest.mark.parametrize("family", EVERY)
def test_replies_are_not_one_token_repeated(family: str) -> None:
    found = case(family).expected[4]
    assert all(len(set(reply)) > 1 for reply in found)
    assert len({tuple(reply) for reply in found}) == 4


def assert_greedy(family: str, name: str, rows: int) -> None:
    known = case(family)
    decoder = split_decoder(known.model)
    prompts = capture_decoder_inputs(known.model, known.inputs[rows])
    found = decode(decoder, strategy(name, decoder), prompts)
    assert [request.output_token_ids for request in found] == known.expected[rows]
    if name == "perfect":
        assert all(request.accepted == request.proposed for request in found)
        assert sum(map(sum, (request.accepted for request in found))) > 3 * rows


@pytest.mark.parametrize("name", ["autoregressive", "block", "layer-skip"])
@pytest.mark.parametrize("family", ALONE)
def test_greedy_tokens_equal_generates(family: str, name: str) -> None:
    assert_greedy(family, name, 1)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("family", EVERY)
def test_greedy_tokens_of_a_batch_equal_generates(family: str, name: str) -> None:
    assert_greedy(family, name, 4)


@pytest.mark.parametrize("images_per_row", [0, 2])
@pytest.mark.parametrize("family", SHOWN)
def test_rows_have_any_number_of_images(family: str, images_per_row: int) -> None:
    known = case(family)
    given = known.make(4, images_per_row=images_per_row)
    assert decoded(known.model, given, "block") == replies(known.model, given, LIMIT)


@pytest.mark.parametrize("family", SHOWN)
def test_rows_with_and_without_images_decode_together(family: str) -> None:
    known = case(family)
    shown, asked = known.inputs[1], known.make(2, images_per_row=0)
    twice = known.make(1, images_per_row=2)
    decoder = split_decoder(known.model)
    prompts = [
        prompt
        for given in (shown, asked, twice)
        for prompt in capture_decoder_inputs(known.model, given)
    ]
    found = decode(decoder, strategy("block", decoder), prompts)
    assert [request.output_token_ids for request in found] == [
        *known.expected[1],
        *replies(known.model, asked, LIMIT),
        *replies(known.model, twice, LIMIT),
    ]


@pytest.mark.parametrize("family", [name for name in SHOWN if name != "kosmos-2.5"])
def test_a_batch_has_rows_with_and_without_images(family: str) -> None:
    """Kosmos-2.5 counts padding, so that such a batch has other positions than its rows."""
    known = case(family)
    given = together(known.inputs[4], known.make(2, images_per_row=0))
    expected = replies(known.model, given, LIMIT)
    assert expected[:4] == known.expected[4]
    assert decoded(known.model, given, "block") == expected


@pytest.mark.parametrize("family", NEWER)
def test_prompts_in_chunks_beside_a_reply(family: str) -> None:
    """A chunk begins and ends anywhere but inside a block of positions that see one another."""
    known = case(family)
    decoder = split_decoder(known.model)
    prompts = capture_decoder_inputs(known.model, known.inputs[4])
    drafts, ends = strategy("perfect", decoder), frozenset({END})
    engine = Engine(decoder, prefill_positions=3)
    requests = [Request(prompt, drafts, LIMIT, end_token_ids=ends) for prompt in prompts]
    engine.add(requests[0])
    engine.step()
    for request in requests[1:]:
        engine.add(request)
    while not all(request.finished for request in requests):
        engine.step()
    assert [request.error for request in requests] == [None] * 4
    assert [request.output_token_ids for request in requests] == known.expected[4]
    assert all(request.accepted == request.proposed for request in requests)


@pytest.mark.parametrize("family", NEWER)
def test_a_search_for_layers_to_skip_sees_what_drafts_see(family: str) -> None:
    known = case(family)
    decoder = split_decoder(known.model)
    prompts = capture_decoder_inputs(known.model, known.inputs[4])[:2]
    found = SampleReplies(decoder, [Request(one, Autoregressive(), LIMIT) for one in prompts])
    assert found.acceptance([]) == 1
    assert found.acceptance([1]) <= 1


@pytest.mark.parametrize("family", NEWER)
def test_prompts_are_longer_than_every_window(family: str) -> None:
    model = case(family).model
    random = torch.Generator().manual_seed(6)
    tokens = torch.randint(3, FIRST_SPECIAL, (2, LONG), generator=random)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = replies(model, given, LIMIT)
    try:
        found = decoded(model, given, "block")
    except InputError:
        # Where all of a prompt sees all of it for want of a mask, a reply's tokens come to see
        # one another too as soon as generate has no cache: there is no one reply to be equal to.
        assert replies(model, given, LIMIT, use_cache=False) != expected
        return
    assert found == expected


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "paligemma2"])
def test_prompts_of_text_within_every_window(family: str) -> None:
    model = case(family).model
    tokens = torch.tensor([[5, 40, 17], [60, 9, 33]])
    assert decoded(model, {"input_ids": tokens}, "block") == replies(
        model, {"input_ids": tokens}, LIMIT
    )


@pytest.mark.parametrize("family", EVERY)
def test_logits_of_a_prompt_equal_transformers(family: str) -> None:
    """Greedy tokens don't show a factor that all logits have; sampling does."""
    known = case(family)
    decoder = split_decoder(known.model)
    [prompt] = capture_decoder_inputs(known.model, known.inputs[1])
    generates = generator_of(known.model).config.is_encoder_decoder
    start = {"decoder_input_ids": torch.tensor([prompt.token_ids])} if generates else {}
    empty = decoder.cache(1, len(prompt.token_ids))
    empty.assign(0, prompt)
    positions = empty.positions([0], len(prompt.token_ids))
    some = torch.tensor([3, 50, 7])
    single = known.model.dtype == torch.float32
    close = {"rtol": 1e-4, "atol": 1e-4} if single else {}
    with torch.inference_mode():
        expected = known.model(**known.inputs[1], **start).logits
        x = decoder.forward_layers(prompt.embeddings[None], positions, empty, range(decoder.depth))
        torch.testing.assert_close(decoder.head(x), expected, **close)
        rows = torch.nn.functional.linear(decoder.norm(x), decoder.lm_head_rows(some))
        restricted = decoder.logits(rows)
    torch.testing.assert_close(restricted, expected[..., some], **close)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_reply_ends_where_a_table_of_positions_does(name: str) -> None:
    """Rows that are longer than others draft past it, in a table without such positions."""
    context = 16
    model, inputs = text("opt", max_position_embeddings=context)
    prompts = capture_decoder_inputs(model, inputs(4))
    expected = [
        replies(model, {"input_ids": torch.tensor([tokens])}, min(LIMIT, context - len(tokens)))[0]
        for tokens in (prompt.token_ids for prompt in prompts)
    ]
    decoder = split_decoder(model)
    with pytest.warns(UserWarning, match="where the model's 16 positions end"):
        found = decode(decoder, strategy(name, decoder), prompts)
    assert [request.output_token_ids for request in found] == expected
