"""The preallocated key/value cache, with a length for each row.

Rows write at their own positions and attend to the keys at positions up to their own. What lies
beyond a row's length is never attended to, so rolling back a rejected draft is setting a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastvlm.functional.errors import InputError


class Projection(NamedTuple):
    """A layer's keys and values of a source: (batch, heads, source, head_dim) each."""

    keys: Tensor
    values: Tensor


@dataclass(slots=True)
class Source:
    """What the rows of an encoder-decoder model attend to beside themselves.

    Args:
        states: The encoder's last states, padded: (batch, source, d_model).
        seen: Which of them are a row's own: (batch, source).
        projections: Each layer's keys and values of them, from its first pass on.
    """

    states: Tensor
    seen: Tensor
    projections: dict[int, Projection] = field(default_factory=dict)

    def keep(self, rows: list[int]) -> Source:
        """Return what some of the rows attend to."""
        kept = {
            layer: Projection(keys[rows], values[rows])
            for layer, (keys, values) in self.projections.items()
        }
        return Source(self.states[rows], self.seen[rows], kept)


@dataclass(slots=True)
class Span:
    """The positions that one pass computes: `width` of them in each row, from `starts` on.

    Args:
        starts: The first position of each row.
        width: Positions in each row.
        end: Keys from this position on are not read; none of them is a row's own.
        positions: (batch, width).
        aligned: Whether all rows start at the same position.
        table: Time, height and width of every position of the cache, (3, batch, capacity), where
            a row has such; None where all three are the position itself.
        source: What an encoder-decoder model attends to; None for any other.
    """

    starts: list[int]
    width: int
    end: int
    positions: Tensor
    aligned: bool
    table: Tensor | None = None
    source: Source | None = None

    def mask(self, window: int | None = None) -> Tensor | None:
        """Return which keys each position sees, as `seen`, or None for causal.

        None means that the usual causal rule is right: a pass from position 0, or one position at
        the end of equally long rows.

        Args:
            window: Positions that a sliding-window layer sees, its own included; None for all.
        """
        within = window is None or self.end <= window
        last = self.end == self.starts[0] + self.width
        if self.aligned and within and last and (self.width == 1 or self.starts[0] == 0):
            return None
        return self.seen(None if within else window)

    def seen(self, window: int | None = None) -> Tensor:
        """Return which keys each position sees: (batch, 1, width, end).

        Args:
            window: Positions that a sliding-window layer sees, its own included; None for all.
        """
        keys = torch.arange(self.end, device=self.positions.device)
        here = self.positions[:, None, :, None]
        seen = keys <= here
        return seen if window is None else seen & (keys > here - window)


class KeyValueCache(Protocol):
    """What running layers needs of a cache."""

    def write_at(self, span: Span) -> None:
        """Say where the layers of the next pass write."""
        ...

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values, and return all that its queries may read."""
        ...


class DecoderCache:
    """Keys and values of every layer: (batch, kv_heads, capacity, head_dim) each.

    Decoder layers of `transformers` call `update`, as they would on its own caches. Layers past the
    target's own number belong to the imitation network.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, 2, batch, kv_heads, capacity, head_dim)
        # Zeros: a key that a mask hides still enters a product with zero, and must be finite.
        self._hold(torch.zeros(shape, dtype=dtype, device=device))
        self.capacity = capacity
        self.lengths = [0] * batch
        self.device = device
        self._counts = torch.arange(capacity, device=device)
        self._span: Span | None = None
        self._positions: list[Tensor | None] = [None] * batch
        self._memories: list[Tensor | None] = [None] * batch
        self._table: Tensor | None = None
        self._source: Source | None = None
        self._laid_out = True

    def seat(self, row: int, positions: Tensor | None = None, memory: Tensor | None = None) -> None:
        """Give a row to a request whose positions are not 0, 1, 2 ..., or which has a source.

        Args:
            row: The row.
            positions: Time, height and width of the prompt's positions, (3, length); those of the
                reply follow the greatest of them. None for ordinary ones.
            memory: The encoder's states of the row's source: (source, d_model). None for none.
        """
        self._positions[row], self._memories[row] = positions, memory
        self._laid_out = False

    def _lay_out(self) -> None:
        """Put what `seat` was given into tensors for all rows."""
        self._table = self._source = None
        if any(positions is not None for positions in self._positions):
            self._table = self._counts.expand(3, len(self._positions), -1).clone()
            for row, positions in enumerate(self._positions):
                if positions is not None:
                    length = positions.shape[1]
                    rest = self._counts[: self.capacity - length]
                    self._table[:, row, :length] = positions
                    self._table[:, row, length:] = positions.max() + 1 + rest
        known = [memory for memory in self._memories if memory is not None]
        if known:
            longest = max(len(memory) for memory in known)
            states = known[0].new_zeros(len(self._memories), longest, known[0].shape[1])
            seen = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
            for row, memory in enumerate(self._memories):
                if memory is not None:
                    states[row, : len(memory)] = memory
                    seen[row, : len(memory)] = True
            self._source = Source(states, seen)
        self._laid_out = True

    def _hold(self, storage: Tensor) -> None:
        self.storage = storage
        self.keys = [layer[0] for layer in storage]
        self.values = [layer[1] for layer in storage]
        self._rows = torch.arange(storage.shape[2], device=storage.device)[:, None]

    def span(self, starts: Sequence[int], width: int, *, to_the_end: bool = False) -> Span:
        """Return the span of a pass over `width` positions from each row's start.

        Args:
            starts: The first position of each row.
            width: Positions in each row.
            to_the_end: Read the whole cache, so that the order in which keys are summed, and with
                it the rounding, does not depend on how far the rows have come.

        Raises:
            InputError: The span doesn't fit into the cache.
        """
        if not self._laid_out:
            self._lay_out()
        first = starts[0]
        aligned = all(start == first for start in starts)
        end = max(starts) + width
        if end > self.capacity:
            raise InputError(
                f"{end} positions are needed, but the cache was made for {self.capacity}."
            )
        if aligned:
            positions = self._counts[first:end].expand(len(starts), width)
        else:
            positions = torch.tensor(starts, device=self.device)[:, None] + self._counts[:width]
        if to_the_end:
            end = self.capacity
        return Span(list(starts), width, end, positions, aligned, self._table, self._source)

    def read(self, row: int, length: int, layers: int) -> Tensor:
        """Return a copy of a row's beginning: (layers, 2, kv_heads, length, head_dim)."""
        return self.storage[:layers, :, row, :, :length].clone()

    def restore(self, row: int, state: Tensor) -> None:
        """Write what `read` returned to the beginning of a row."""
        self.storage[: len(state), :, row, :, : state.shape[3]] = state

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self._hold(self.storage[:, :, rows])
        self.lengths = [self.lengths[row] for row in rows]
        self._positions = [self._positions[row] for row in rows]
        self._memories = [self._memories[row] for row in rows]
        self._table = None if self._table is None else self._table[:, rows]
        self._source = None if self._source is None else self._source.keep(rows)

    def write_at(self, span: Span) -> None:
        """Say where the layers of the next pass write."""
        self._span = span

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, and return all that its queries may read.

        Args:
            keys: (batch, kv_heads, width, head_dim).
            values: (batch, kv_heads, width, head_dim).
            layer_idx: The layer.

        Returns:
            Two of (batch, kv_heads, end, head_dim).
        """
        span = self._span
        assert span is not None  # `write_at` comes first
        all_keys, all_values = self.keys[layer_idx], self.values[layer_idx]
        if span.aligned:
            first = span.starts[0]
            all_keys[:, :, first : first + span.width] = keys
            all_values[:, :, first : first + span.width] = values
        else:
            all_keys[self._rows, :, span.positions] = keys.transpose(1, 2)
            all_values[self._rows, :, span.positions] = values.transpose(1, 2)
        return all_keys[:, :, : span.end], all_values[:, :, : span.end]
