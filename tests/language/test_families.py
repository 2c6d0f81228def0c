"""Every family of models decodes to the tokens of transformers' own generate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from fastvlm.decoding import (
    Autoregressive,
    Decoding,
    Drafter,
    PromptLookup,
    Request,
    SelfSpeculative,
)
from fastvlm.drafting import FixedLength, ImitationConfig, ImitationNetwork
from fastvlm.drafting.imitation import initialise_from
from fastvlm.language import Prompt, SplitDecoder, captured, split_decoder
from tests.families import DEPTH, END, FAMILIES, Inputs, replies

LIMIT = 14
STRATEGIES = ("autoregressive", "early exit", "lookup", "block", "perfect", "mlp")


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


def network(decoder: SplitDecoder, kind: str, *, perfect: bool = False) -> ImitationNetwork:
    torch.manual_seed(1)
    made = ImitationNetwork(
        ImitationConfig(
            kind=kind,
            exit_layer=1,
            blocks=DEPTH - 1 if perfect else 1,
            text_config=decoder.decoder.config.to_dict(),
        )
    )
    if perfect or kind == "mlp":
        initialise_from(made, decoder.layers)
    return made.to(decoder.dtype).eval()


def strategy(name: str, decoder: SplitDecoder) -> Drafter:
    if name == "autoregressive":
        return Autoregressive()
    if name == "lookup":
        return PromptLookup(margin=4)
    made = {
        "early exit": lambda: None,
        "block": lambda: network(decoder, "block"),
        "perfect": lambda: network(decoder, "block", perfect=True),
        "mlp": lambda: network(decoder, "mlp"),
    }[name]()
    return SelfSpeculative(decoder, 1, made, FixedLength(3))


def decode(decoder: SplitDecoder, drafter: Drafter, prompts: list[Prompt]) -> list[Request]:
    requests = [
        Request(
            prompt.tokens,
            prompt.embeddings,
            LIMIT,
            frozenset({END}),
            positions=prompt.positions,
            memory=prompt.memory,
        )
        for prompt in prompts
    ]
    for _ in Decoding(decoder, drafter, requests):
        pass
    return requests


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
        assert sum(map(sum, (request.accepted for request in found))) > 5 * rows
