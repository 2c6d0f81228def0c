"""The rows being decoded."""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm.decoding.selection import Selection
from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import SplitDecoder


@dataclass(slots=True)
class Batch:
    """The rows being decoded, as drafters see them.

    Args:
        decoder: The target.
        cache: Its cache, whose `lengths` are the positions already committed.
        last: Each row's last committed token, which the cache doesn't hold yet.
        history: All of each row's tokens, its prompt's and the last one included.
        replies: The reply in each of them.
        selections: How each row chooses its tokens.
        end_tokens: Tokens that end a reply.
        vocabulary_size: Logits of the target.
    """

    decoder: SplitDecoder
    cache: DecoderCache
    last: list[int]
    history: list[list[int]]
    replies: list[list[int]]
    selections: list[Selection]
    end_tokens: frozenset[int]
    vocabulary_size: int = 0

    @property
    def plain(self) -> bool:
        """Whether all rows take the likeliest token, and nothing else plays a part."""
        return all(selection.plain for selection in self.selections)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, which have ended."""
        self.cache.keep(rows)
        self.last = [self.last[row] for row in rows]
        self.history = [self.history[row] for row in rows]
        self.replies = [self.replies[row] for row in rows]
        self.selections = [self.selections[row] for row in rows]
