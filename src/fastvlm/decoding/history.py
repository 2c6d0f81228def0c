"""A request's tokens, and what followed earlier occurrences of the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LONGEST_MATCH = 16
"""Tokens after which a match is not compared any further: it could hardly be surer."""


class Copy(NamedTuple):
    """Tokens that followed an earlier occurrence.

    Args:
        tokens: The tokens.
        match: The number of last tokens that are the same there, at most `LONGEST_MATCH`.
    """

    tokens: list[int]
    match: int


class History:
    """A request's tokens, and where each n-gram of them was last followed by another token.

    Args:
        ngram: The maximum number of last tokens to look for.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(ngram)]
        """For each size, the position after an n-gram's latest occurrence."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the next tokens."""
        for token in tokens:
            end = len(self.tokens)
            for size, known in enumerate(self._after[:end], 1):
                known[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token)

    def look_up(self, drafted: Sequence[int], most: int) -> Copy | None:
        """Return what followed the longest and latest earlier occurrence of the last tokens.

        A copy may go on into itself, as what repeats usually goes on.

        Args:
            drafted: Tokens that are assumed to follow the history.
            most: The maximum number of tokens to copy.
        """
        tokens = [*self.tokens[-LONGEST_MATCH:], *drafted]
        for size in range(min(self.ngram, len(tokens)), 0, -1):
            start = self._after[size - 1].get(tuple(tokens[-size:]))
            if start is None:
                continue
            match = size
            while (
                match < min(LONGEST_MATCH, len(tokens), start)
                and self.tokens[start - match - 1] == tokens[-match - 1]
            ):
                match += 1
            followed = [*self.tokens[start:], *drafted]
            period = len(followed)
            return Copy([followed[place % period] for place in range(most)], match)
        return None
