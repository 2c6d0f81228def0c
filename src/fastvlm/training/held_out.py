"""Drafts measured by actual decoding of what they have not learnt from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastvlm.decoding import Autoregressive, Decoding, Drafter
from fastvlm.drafting import ImitationNetwork
from fastvlm.functional.placement import moved
from fastvlm.functional.statistics import Spread
from fastvlm.training.replies import Asked
from fastvlm.vlm import VisionLanguageModel

ORDINARY = ""
"""Stands among drafts for decoding without one."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """How a draft did.

    Args:
        acceptance_rate: Accepted tokens per drafted one.
        acceptance_length: Tokens per pass of the full model.
        tokens_per_second: Of decoding, without the prompts' passes.
        speedup: Time of ordinary decoding over the draft's: over the replies.
    """

    acceptance_rate: float
    acceptance_length: float
    tokens_per_second: float
    speedup: Spread


def decode_held_out(
    vlm: VisionLanguageModel,
    networks: Mapping[str, ImitationNetwork],
    asked: Sequence[Asked],
    *,
    max_new_tokens: int = 160,
) -> dict[str, Decoded]:
    """Answer each question with every draft before the next one, in an order that turns.

    Args:
        vlm: The target.
        networks: The drafts, by name.
        asked: The questions; the first is asked once more beforehand, unmeasured.
        max_new_tokens: The most tokens of a reply.

    Raises:
        InputError: A picture can't be read.
    """
    drafters: dict[str, Drafter] = {ORDINARY: Autoregressive()}
    for name, network in networks.items():
        # One that is still being trained stays as it is.
        own = moved(copy.deepcopy(network), vlm.decoder.dtype).eval()
        drafters[name] = vlm.drafter("imitation", network=own)
    names = list(drafters)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens: dict[str, int] = dict.fromkeys(names, 0)
    proposed: dict[str, int] = dict.fromkeys(names, 0)
    cycles: dict[str, int] = dict.fromkeys(names, 0)
    for number, one in enumerate([asked[0], *asked]):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            request = vlm.request(one.messages, max_new_tokens=max_new_tokens)
            for _ in Decoding(vlm.decoder, drafters[name], [request]):
                pass
            if number and len(request.reply) > 1:
                seconds[name].append(request.times[-1] - request.times[0])
                tokens[name] += len(request.reply) - 1
                proposed[name] += sum(request.proposed)
                cycles[name] += len(request.proposed)
    return {
        name: Decoded(
            (tokens[name] - cycles[name]) / max(1, proposed[name]),
            tokens[name] / max(1, cycles[name]),
            tokens[name] / sum(seconds[name]),
            Spread.of([a / b for a, b in zip(seconds[ORDINARY], seconds[name], strict=True)]),
        )
        for name in networks
    }
