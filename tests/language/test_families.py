"""Every family of models decodes to the tokens of transformers' own generate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
from transformers import PreTrainedModel

from fastvlm.language import captured, split_decoder
from tests.families import FAMILIES, Inputs, replies
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
    found = decode(decoder, strategy(name, decoder), captured(known.model, known.inputs[rows]))
    assert [request.reply for request in found] == known.expected[rows]
    if name == "perfect":
        assert all(request.accepted == request.proposed for request in found)
        assert sum(map(sum, (request.accepted for request in found))) > 3 * rows
