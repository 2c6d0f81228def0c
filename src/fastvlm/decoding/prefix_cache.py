"""States of earlier prompts and replies, so that what a prompt shares is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fastvlm.functional.lru import LruBytes


@dataclass(frozen=True, slots=True)
class PrefixEntry:
    """The states of a prompt and its reply. Its tensors are read-only.

    Args:
        keys: A key for each position, see `DecoderInputs.keys`.
        state: Keys and values of each layer of the target: (2, kv_heads, length, head_dim).
        exits: Hidden states of the prompt by their exit layer, (prompt, d_model), from which an
            imitation network fills its own cache.
    """

    keys: list[Hashable]
    state: Mapping[int, Tensor]
    exits: dict[int, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in (*self.state.values(), *self.exits.values()))


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """A kept entry that shares a prefix with a prompt.

    Args:
        entry: The entry.
        length: Positions of the shared prefix, at least one.
    """

    entry: PrefixEntry
    length: int


class PrefixCache:
    """Keeps the states of prompts and their replies. It may be used from any thread.

    Args:
        lru: Where they are kept; it may be shared with other caches.
    """

    def __init__(self, lru: LruBytes) -> None:
        self.lru = lru

    def match(self, keys: Sequence[Hashable]) -> PrefixHit | None:
        """Return the entry with the longest prefix in common with a prompt; None if there is none.

        Args:
            keys: The prompt's keys, see `DecoderInputs.keys`.
        """
        wanted = list(keys)
        best: tuple[int, _Key] | None = None
        for key, entry in self._entries():
            length = shared_length(entry.keys, wanted)
            # Of equals, the most recently used: a token that all prompts begin with should not
            # keep an old entry alive.
            if length and (best is None or length >= best[0]):
                best = length, key
        if best is None:
            return None
        length, key = best
        # Another thread may have dropped it since.
        found: PrefixEntry | None = self.lru.get(key)
        return None if found is None else PrefixHit(found, length)

    def put(self, keys: Sequence[Hashable], nbytes: int, make: Callable[[], PrefixEntry]) -> bool:
        """Keep a prompt and its reply, in place of entries that they continue.

        Args:
            keys: The keys of all positions, of prompt and reply.
            nbytes: The entry's size in bytes.
            make: Makes the entry; it isn't called for one that is larger than the limit.

        Returns:
            Whether the entry is kept: one that is larger than the limit is not, and drops no other.
        """
        if not keys or not self.lru.fits(nbytes):
            return False
        entry = make()
        own = list(keys)
        continued = [
            key
            for key, older in self._entries()
            if shared_length(older.keys, own) == len(older.keys)
        ]
        return self.lru.put(_Key(self), entry, entry.nbytes, continued)

    def _entries(self) -> list[tuple[_Key, PrefixEntry]]:
        return [
            (key, value) for key, value in self.lru if isinstance(key, _Key) and key.cache is self
        ]


@dataclass(frozen=True, slots=True, eq=False)
class _Key:
    """The key of an entry: it equals itself alone, and says which cache's the entry is."""

    cache: PrefixCache


def shared_length(one: list[Hashable], other: list[Hashable]) -> int:
    """Return the length of the common prefix of two lists."""
    # Slices compare many times faster than a loop does, so the first difference is found by
    # halving.
    high = min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
