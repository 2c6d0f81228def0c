"""Every family of models decodes to the tokens of transformers' own generate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from fastvlm.language import capture_decoder_inputs, split_decoder
from tests.families import FAMILIES, Inputs, replies, text
from tests.language.decoding import LIMIT, STRATEGIES, decode, strategy


@dataclass(frozen=True)
class Case:
    """A family's model, and what transformers makes of its inputs."""

    model: PreTrainedModel
    inputs: dict[int, Inputs]
    expected: dict[int, list[list[int]]]


@cache
def case(family: str) -> Case:
    model, inputs = FAMILIES[family]()
    given = {rows: inputs(rows) for rows in (1, 4)}
    return Case(model, given, {rows: replies(model, given[rows], LIMIT) for rows in given})


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_not_one_token_repeated(family: str) -> None:
    found = case(family).expected[4]
    assert all(len(set(reply)) > 1 for reply in found)
    assert len({tuple(reply) for reply in found}) == 4


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generates(family: str, name: str, rows: int) -> None:
    known = case(family)
    decoder = split_decoder(known.model)
    found = decode(
        decoder, strategy(name, decoder), capture_decoder_inputs(known.model, known.inputs[rows])
    )
    assert [request.output_token_ids for request in found] == known.expected[rows]
    if name == "perfect":
        assert all(request.accepted == request.proposed for request in found)
        assert sum(map(sum, (request.accepted for request in found))) > 3 * rows


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_prompt_equal_transformers(family: str) -> None:
    """Greedy tokens don't show a factor that all logits have; sampling does."""
    known = case(family)
    decoder = split_decoder(known.model)
    [prompt] = capture_decoder_inputs(known.model, known.inputs[1])
    start = (
        {}
        if prompt.encoder_states is None
        else {"decoder_input_ids": torch.tensor([prompt.token_ids])}
    )
    empty = decoder.cache(1, len(prompt.token_ids))
    empty.assign(0, prompt)
    positions = empty.positions([0], len(prompt.token_ids))
    some = torch.tensor([3, 50, 7])
    with torch.inference_mode():
        expected = known.model(**known.inputs[1], **start).logits
        x = decoder.forward_layers(prompt.embeddings[None], positions, empty, range(decoder.depth))
        torch.testing.assert_close(decoder.head(x), expected)
        rows = torch.nn.functional.linear(decoder.norm(x), decoder.lm_head_rows(some))
        restricted = decoder.logits(rows)
    torch.testing.assert_close(restricted, expected[..., some])


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
