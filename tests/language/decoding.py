"""Decoding captured prompts with every strategy."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest
import torch

from fastvlm.decoding import (
    Autoregressive,
    Engine,
    LayerSkip,
    PromptLookup,
    Request,
    SelfSpeculative,
    Strategy,
)
from fastvlm.decoding.lookup import Lookup
from fastvlm.drafting import ConfidenceLength, FixedLength, ImitationConfig, ImitationNetwork
from fastvlm.drafting.imitation import initialise_from
from fastvlm.language import DecoderInputs, SplitDecoder
from tests.families import DEPTH, END

LIMIT = 14
STRATEGIES = (
    "autoregressive", "early-exit", "prompt-lookup", "block", "perfect", "mlp", "layer-skip",
    "cascade",
)  # fmt: skip


def pack_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small matrices packed too, as the models of the tests have no others."""
    monkeypatch.setattr("fastvlm.functional.products.SMALLEST_IN_16_BITS", 1)
    monkeypatch.setattr("fastvlm.functional.products.SMALLEST_IN_32_BITS", 1)


def network(
    decoder: SplitDecoder,
    kind: str,
    *,
    perfect: bool = False,
    vocabulary: Sequence[int] = (),
    exit_layer: int = 1,
) -> ImitationNetwork:
    torch.manual_seed(1)
    made = ImitationNetwork(
        ImitationConfig(
            kind=kind,
            exit_layer=exit_layer,
            blocks=DEPTH - exit_layer if perfect else 1,
            text_config=decoder.decoder.config.to_dict(),
            draft_vocabulary_size=len(vocabulary) or None,
        )
    )
    if vocabulary:
        made.draft_vocabulary.copy_(torch.tensor(vocabulary))
    if perfect or kind == "mlp":
        initialise_from(made, decoder.layers)
    return made.implement_as(decoder.decoder.config).to(decoder.dtype).eval()


def strategy(name: str, decoder: SplitDecoder, exit_layer: int = 1) -> Strategy:
    if name == "autoregressive":
        return Autoregressive()
    if name == "prompt-lookup":
        return PromptLookup(FixedLength(4))
    if name == "layer-skip":
        return LayerSkip(decoder, [1], FixedLength(3))
    made = {
        "early-exit": lambda: None,
        "block": lambda: network(decoder, "block", exit_layer=exit_layer),
        "perfect": lambda: network(decoder, "block", perfect=True, exit_layer=exit_layer),
        "cascade": lambda: network(decoder, "block", exit_layer=exit_layer),
        "mlp": lambda: network(decoder, "mlp", exit_layer=exit_layer),
    }[name]()
    rule = ConfidenceLength(4, 0.3) if name == "cascade" else FixedLength(3)
    lookup = Lookup() if name == "cascade" else None
    return SelfSpeculative(decoder, exit_layer, made, rule, lookup)


def decode(
    decoder: SplitDecoder,
    drafts: Strategy,
    prompts: Sequence[DecoderInputs],
    limit: int = LIMIT,
    ends: Collection[int] = (END,),
) -> list[Request]:
    """Decode prompts together, each in a slot of one engine; a failure is raised."""
    requests = [Request(one, drafts, limit, end_token_ids=frozenset(ends)) for one in prompts]
    for request in Engine(decoder).run(requests):
        if request.error is not None:
            raise request.error
    return requests
