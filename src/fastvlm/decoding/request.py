"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fastvlm.decoding.prefix_cache import PrefixCache
from fastvlm.decoding.selection import Selection
from fastvlm.decoding.text import ReplyText
from fastvlm.functional.statistics import DecodingStatistics


@dataclass(slots=True)
class Request:
    """One reply to decode, and in the end what was decoded and how.

    Args:
        tokens: The prompt's tokens, a placeholder for each visual token.
        embeddings: The prompt's embeddings, the picture's in their places: (length, d_embedding).
        max_new_tokens: The most tokens of the reply.
        end_tokens: Tokens that end a reply.
        keys: What tells each position of the prompt from others, see `PrefixEntry`.
        store: Where what was computed before is found, and what is computed here is kept.
        started: When its work began (`time.perf_counter`), for the time to first token.
        selection: How its tokens are chosen.
        stops: Asked after each token whether the reply, of which it is the last, ends there.
        text: The reply's text, whose stop strings end the reply.
        logits: Where the target's logits of each token are kept, (vocabulary,); None for nowhere.
        positions: Time, height and width of the prompt's positions, (3, length), for a model that
            tells them apart; None for 0, 1, 2 ...
        memory: The encoder's states of the source, (source, d_model), for an encoder-decoder.
    """

    tokens: list[int]
    embeddings: Tensor
    max_new_tokens: int
    end_tokens: frozenset[int] = frozenset()
    keys: list[Hashable] = field(default_factory=list)
    store: PrefixCache | None = None
    started: float = field(default_factory=time.perf_counter)
    selection: Selection = field(default_factory=Selection)
    stops: Callable[[list[int]], bool] | None = None
    text: ReplyText | None = None
    logits: list[Tensor] | None = None
    positions: Tensor | None = None
    memory: Tensor | None = None
    reply: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    """Whether each token of the reply was drafted and accepted."""
    times: list[float] = field(default_factory=list)
    """When each token of the reply was known."""
    proposed: list[int] = field(default_factory=list)
    """Drafted tokens of each cycle."""
    accepted: list[int] = field(default_factory=list)
    """Accepted tokens of each cycle."""
    finished: bool = False
    exits: Tensor | None = None
    """The exit layer's states of the prompt, (length, d_model), where they are kept."""

    @property
    def statistics(self) -> DecodingStatistics:
        """How the reply was decoded."""
        return DecodingStatistics.of(self.started, self.times, self.proposed, self.accepted)

    def take(self, tokens: Sequence[int], accepted: int, now: float) -> int:
        """Add a cycle's tokens, cut where the reply ends; return how many stayed."""
        for index, token in enumerate(tokens):
            self.reply.append(token)
            self.drafted.append(index < accepted)
            self.times.append(now)
            if (
                token in self.end_tokens
                or len(self.reply) >= self.max_new_tokens
                or (self.stops is not None and self.stops(self.reply))
                or (self.text is not None and self.text.stop and self.text.follow(self.reply))
            ):
                self.finished = True
                return index + 1
        return len(tokens)
