"""The preallocated key/value cache, with a length for each row.

Rows write at their own positions and attend to the keys at positions up to their own. What lies
beyond a row's length is never attended to, so rolling back a rejected draft is setting a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvlm.functional.errors import InputError


@dataclass(slots=True)
class Span:
    """The positions that one pass computes: `width` of them in each row, from `starts` on.

    Args:
        starts: The first position of each row.
        width: Positions in each row.
        end: One past the last position of any row: keys beyond it are not read.
        positions: (batch, width).
        aligned: Whether all rows start at the same position.
    """

    starts: list[int]
    width: int
    end: int
    positions: Tensor
    aligned: bool

    def mask(self, window: int | None = None) -> Tensor | None:
        """Return which keys each position sees: (batch, 1, width, end), or None for causal.

        None means that the usual causal rule is right: a pass from position 0, or one position at
        the end of equally long rows.

        Args:
            window: Positions that a sliding-window layer sees, its own included; None for all.
        """
        if window is not None and self.end <= window:
            window = None
        if self.aligned and window is None and (self.width == 1 or self.starts[0] == 0):
            return None
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
        self.storage = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = [self.storage[layer, 0] for layer in range(layers)]
        self.values = [self.storage[layer, 1] for layer in range(layers)]
        self.capacity = capacity
        self.lengths = [0] * batch
        self.device = device
        self._rows = torch.arange(batch, device=device)[:, None]
        self._counts = torch.arange(capacity, device=device)
        self._span: Span | None = None

    def span(self, starts: Sequence[int], width: int) -> Span:
        """Return the span of a pass over `width` positions from each row's start.

        Raises:
            InputError: The span doesn't fit into the cache.
        """
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
        return Span(list(starts), width, end, positions, aligned)

    def read(self, row: int, length: int, layers: int) -> Tensor:
        """Return a copy of a row's beginning: (layers, 2, kv_heads, length, head_dim)."""
        return self.storage[:layers, :, row, :, :length].clone()

    def restore(self, row: int, state: Tensor) -> None:
        """Write what `read` returned to the beginning of a row."""
        self.storage[: len(state), :, row, :, : state.shape[3]] = state

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
            all_keys[:, :, first : span.end] = keys
            all_values[:, :, first : span.end] = values
        else:
            all_keys[self._rows, :, span.positions] = keys.transpose(1, 2)
            all_values[self._rows, :, span.positions] = values.transpose(1, 2)
        return all_keys[:, :, : span.end], all_values[:, :, : span.end]
