"""What is kept of a picture for the next question about it: its features, its keys and values."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Prefix:
    """The beginning of a prompt, up to its picture's last visual token.

    Args:
        tokens: The prompt's tokens so far.
        features: The picture's visual tokens, projected: (visual tokens, d_model).
        store: Where it is kept.
        state: Keys and values of the target, (layers, 2, kv_heads, length, head_dim).
        exits: Hidden states by their exit layer, (length, d_model), from which an imitation network
            fills its own cache.
    """

    tokens: list[int]
    features: Tensor
    store: PrefixStore
    state: Tensor | None = None
    exits: dict[int, Tensor] = field(default_factory=dict)

    def knows(self, exit_layer: int | None) -> bool:
        """Return whether keys and values are kept, and an exit layer's states where one is read."""
        return self.state is not None and (exit_layer is None or exit_layer in self.exits)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        states = () if self.state is None else (self.state,)
        return sum(kept.nbytes for kept in (self.features, *states, *self.exits.values()))


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
