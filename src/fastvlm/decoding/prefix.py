"""What is kept of a picture for the next question about it: its features, its keys and values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Prefix:
    """The beginning of a prompt, up to its picture's last visual token.

    Args:
        tokens: The prompt's tokens so far.
        features: The picture's visual tokens, projected: (visual tokens, d_model).
        store: Where it is kept.
        states: Keys and values, (layers, 2, kv_heads, length, head_dim), by whose layers follow the
            target's own in the cache: those of an imitation network, or of None.
    """

    tokens: list[int]
    features: Tensor
    store: PrefixStore
    states: dict[Hashable, Tensor] = field(default_factory=dict)

    def find(self, owner: Hashable, layers: int) -> Tensor | None:
        """Return the keys and values of the target's layers and those of `owner`."""
        if owner in self.states:
            return self.states[owner]
        if owner is not None or not self.states:
            return None
        # The target's own layers are the same in all of them.
        return next(iter(self.states.values()))[:layers]

    def remember(self, owner: Hashable, state: Tensor) -> None:
        """Keep keys and values for later."""
        self.states[owner] = state
        self.store.trim()

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(kept.nbytes for kept in (self.features, *self.states.values()))


class PrefixStore:
    """The prefixes that were used last, within a limit of bytes.

    Args:
        limit: Bytes in all; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: OrderedDict[str, Prefix] = OrderedDict()

    def find(self, picture: str) -> Prefix | None:
        """Return a picture's prefix, if it is kept, and mark it as used."""
        found = self.kept.get(picture)
        if found is not None:
            self.kept.move_to_end(picture)
        return found

    def keep(self, picture: str, tokens: list[int], features: Tensor) -> Prefix:
        """Keep a picture's features, and what is remembered of them later; replace what was."""
        made = Prefix(tokens, features, self)
        self.kept[picture] = made
        self.kept.move_to_end(picture)
        self.trim()
        return made

    def clear(self) -> None:
        """Forget everything."""
        self.kept.clear()

    def trim(self) -> None:
        """Forget what was used longest ago, until the rest fits."""
        while self.kept and self.size > self.limit:
            self.kept.popitem(last=False)

    @property
    def size(self) -> int:
        """Bytes that all of it takes."""
        return sum(prefix.size for prefix in self.kept.values())
