"""Decoding captured prompts with every strategy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
from fastvlm.language import DecoderInputs, SplitDecoder
from tests.families import DEPTH, END

LIMIT = 14
STRATEGIES = ("autoregressive", "early exit", "lookup", "block", "perfect", "mlp")


def network(
    decoder: SplitDecoder, kind: str, *, perfect: bool = False, vocabulary: Sequence[int] = ()
) -> ImitationNetwork:
    torch.manual_seed(1)
    made = ImitationNetwork(
        ImitationConfig(
            kind=kind,
            exit_layer=1,
            blocks=DEPTH - 1 if perfect else 1,
            text_config=decoder.decoder.config.to_dict(),
            draft_vocabulary_size=len(vocabulary) or None,
        )
    )
    if vocabulary:
        made.draft_vocabulary.copy_(torch.tensor(vocabulary))
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


def decode(decoder: SplitDecoder, drafter: Drafter, prompts: list[DecoderInputs]) -> list[Request]:
    requests = [
        Request(
            prompt.token_ids,
            prompt.embeddings,
            LIMIT,
            frozenset({END}),
            positions=prompt.position_ids,
            memory=prompt.encoder_states,
        )
        for prompt in prompts
    ]
    for _ in Decoding(decoder, drafter, requests):
        pass
    return requests
