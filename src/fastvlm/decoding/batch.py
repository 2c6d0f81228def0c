"""The rows being decoded."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import SplitDecoder


@dataclass(slots=True)
class Batch:
    """The rows being decoded, as drafters see them.

    Args:
        decoder: The target.
        cache: Its cache, whose `lengths` are the positions already committed.
        last: Each row's last committed token, which the cache doesn't hold yet.
        history: All of each row's tokens, its prompt's and the last one included; a batch is made
            when they are the prompts.
        active: Whether each row still decodes.
        end_tokens: Tokens that end a reply.
    """

    decoder: SplitDecoder
    cache: DecoderCache
    last: list[int]
    history: list[list[int]]
    active: list[bool]
    end_tokens: frozenset[int]
    prompts: list[int] = field(init=False)
    """Tokens of each row's prompt."""

    def __post_init__(self) -> None:
        self.prompts = [len(tokens) for tokens in self.history]

    def replied(self, row: int) -> int:
        """Return how many tokens a row's reply has so far."""
        return len(self.history[row]) - self.prompts[row]
