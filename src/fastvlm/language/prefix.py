"""What is kept of earlier prompts and replies, so that what they share is not computed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Features = Tensor | Sequence[Tensor]
"""Pictures' visual tokens, (visual tokens, d_model), in one tensor or in one for each picture."""


@dataclass(slots=True)
class Kept:
    """What was computed for a prompt and its reply.

    Args:
        keys: What tells each position from others: its token, or the picture and the visual token.
        state: Keys and values of the target, (layers, 2, kv_heads, length, head_dim).
        exits: Hidden states of the prompt by their exit layer, (prompt, d_model), from which an
            imitation network fills its own cache.
    """

    keys: list[Hashable]
    state: Tensor
    exits: dict[int, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(tensor.nbytes for tensor in (self.state, *self.exits.values()))

    def shared(self, keys: Sequence[Hashable]) -> int:
        """Return how many positions at the beginning are the same."""
        for index, (own, other) in enumerate(zip(self.keys, keys, strict=False)):
            if own != other:
                return index
        return min(len(self.keys), len(keys))


class PrefixStore:
    """What was used last of pictures' features, prompts and replies, within a limit of bytes.

    Args:
        limit: Bytes in all; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        """Bytes that all of it takes."""
        # Pictures by their digests, prompts by numbers; what was used last stands last.
        self._kept: OrderedDict[str | int, Features | Kept] = OrderedDict()
        self._number = 0

    def features(self, picture: str) -> Features | None:
        """Return what was kept of a picture, by its digest."""
        found = self._kept.get(picture)
        if found is None or isinstance(found, Kept):
            return None
        self._kept.move_to_end(picture)
        return found

    def keep_features(self, picture: str, features: Features) -> None:
        """Keep a picture's visual tokens."""
        self._add(picture, features)

    def longest(self, keys: Sequence[Hashable]) -> tuple[Kept, int] | None:
        """Return what shares the longest beginning with a prompt, and how many positions."""
        best: tuple[int, int | str, Kept] = (0, 0, Kept([], Tensor()))
        for name, kept in self._kept.items():
            # Of equals, what was used last: a word that all prompts begin with keeps nothing alive.
            if isinstance(kept, Kept) and (length := kept.shared(keys)) >= best[0]:
                best = length, name, kept
        if not best[0]:
            return None
        self._kept.move_to_end(best[1])
        return best[2], best[0]

    def keep(self, kept: Kept) -> None:
        """Keep a prompt and its reply, in place of those of which they are the continuation."""
        for name, older in list(self._kept.items()):
            if isinstance(older, Kept) and older.shared(kept.keys) == len(older.keys):
                self._drop(name)
        self._number += 1
        self._add(self._number, kept)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.size = 0

    def _add(self, name: str | int, kept: Features | Kept) -> None:
        if name in self._kept:
            self._drop(name)
        self._kept[name] = kept
        self.size += _bytes(kept)
        while self.size > self.limit:
            self._drop(next(iter(self._kept)))

    def _drop(self, name: str | int) -> None:
        self.size -= _bytes(self._kept.pop(name))


def _bytes(kept: Features | Kept) -> int:
    return kept.size if isinstance(kept, Kept) else sum(tensor.nbytes for tensor in kept)
