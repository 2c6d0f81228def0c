"""Measuring drafts by decoding held-out questions."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastvlm.decoding import Autoregressive, Strategy
from fastvlm.decoding.strategy_factory import StrategyFactory
from fastvlm.drafting import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.functional.placement import moved
from fastvlm.functional.statistics import Acceptance, DecodingStatistics, Spread
from fastvlm.training.replies import TrainingPrompt
from fastvlm.vlm import VisionLanguageModel

ORDINARY_KEY = ""
"""The name of decoding without a draft, among drafts."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A draft's results.

    Args:
        acceptance_rate: Accepted tokens per drafted token.
        acceptance_length: Tokens per pass of the full model.
        tokens_per_second: Decoding throughput, without the prefill.
        speedup: Time of ordinary decoding over the draft's, over the replies.
    """

    acceptance_rate: float
    acceptance_length: float
    tokens_per_second: float
    speedup: Spread


def decode_held_out(
    vlm: VisionLanguageModel,
    networks: Mapping[str, ImitationNetwork],
    asked: Sequence[TrainingPrompt],
    *,
    max_new_tokens: int = 160,
) -> dict[str, Decoded]:
    """Decode every question with each draft and without one, in rotating order.

    Args:
        vlm: The target.
        networks: The drafts, by name.
        asked: The questions; the first is decoded once beforehand without being measured.
        max_new_tokens: The maximum number of tokens in a reply.

    Raises:
        InputError: An image can't be read, or all replies are one token long.
    """
    strategies: dict[str, Strategy] = {ORDINARY_KEY: Autoregressive()}
    for name, network in networks.items():
        # One that is still being trained stays as it is.
        own = moved(copy.deepcopy(network), vlm.decoder.dtype).eval()
        # The model's own factory would keep the copy for good.
        strategies[name] = StrategyFactory(vlm.decoder, own).make("imitation")
    names = list(strategies)
    replies: dict[str, list[DecodingStatistics]] = {name: [] for name in names}
    for number, one in enumerate([asked[0], *asked]):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            request = vlm.request(
                one.messages, strategy=strategies[name], max_new_tokens=max_new_tokens
            )
            for _ in vlm.engine.run([request]):
                pass
            if request.error is not None:
                raise request.error
            if number and len(request.output_token_ids) > 1:
                replies[name].append(request.statistics)
    return {name: compared(replies[name], replies[ORDINARY_KEY]) for name in networks}


def compared(own: Sequence[DecodingStatistics], ordinary: Sequence[DecodingStatistics]) -> Decoded:
    """Return a draft's results, compared with ordinary decoding of the same replies.

    Raises:
        InputError: No reply has a second token, which is the first that can be drafted.
    """
    taken, usual = ([decode_ms(reply) for reply in replies] for replies in (own, ordinary))
    if not taken:
        raise InputError("Every held-out reply is one token long; drafts have nothing to do.")
    worth = Acceptance.over(own)
    return Decoded(
        worth.rate or 0.0,
        worth.length or 0.0,
        1e3 * sum(reply.tokens - 1 for reply in own) / sum(taken),
        Spread.of([a / b for a, b in zip(usual, taken, strict=True)]),
    )


def decode_ms(reply: DecodingStatistics) -> float:
    """Return the milliseconds from a reply's first token to its last."""
    return (reply.tpot_ms or 0.0) * (reply.tokens - 1)
