"""A least-recently-used cache, limited in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any


class LruBytes:
    """A thread-safe cache that drops the least recently used values beyond a number of bytes.

    Args:
        limit: The maximum bytes of all values together; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        # Values with their sizes, the most recently used last.
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all values together, at most `limit`."""
        return self._nbytes

    def get(self, key: Hashable) -> Any | None:
        """Return a value and mark it as the most recently used one; None if it isn't there.

        Args:
            key: The key that it was stored under.
        """
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def fits(self, nbytes: int) -> bool:
        """Return whether a value of so many bytes could be kept at all."""
        return self.limit > 0 and nbytes <= self.limit

    def put(
        self, key: Hashable, value: Any, nbytes: int, replacing: Iterable[Hashable] = ()
    ) -> bool:
        """Keep a value, and drop the least recently used ones if there is no room.

        Args:
            key: The value's key; a value that has it already is replaced.
            value: The value, anything but None.
            nbytes: The value's size in bytes.
            replacing: Keys of values to drop first, as this one makes them redundant.

        Returns:
            Whether the value is kept: one that is larger than the limit is not, and drops no other.
        """
        if not self.fits(nbytes):
            return False
        with self._lock:
            for needless in (key, *replacing):
                self._drop(needless)
            while self._values and self._nbytes + nbytes > self.limit:
                self._drop(next(iter(self._values)))
            self._values[key] = value, nbytes
            self._nbytes += nbytes
        return True

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._values.clear()
            self._nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[tuple[Hashable, Any]]:
        """Iterate over the keys and values of this moment, the least recently used first."""
        with self._lock:
            found = [(key, value) for key, (value, _) in self._values.items()]
        return iter(found)

    def _drop(self, key: Hashable) -> None:
        if key in self._values:
            self._nbytes -= self._values.pop(key)[1]
