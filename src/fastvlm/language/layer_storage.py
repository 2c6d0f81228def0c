"""The memory of one layer's keys and values, in slots."""

from __future__ import annotations

from torch import Tensor

from fastvlm.language.positions import Positions

BLOCK_POSITIONS = 64
"""The cache grows, and is cleared, in blocks of so many positions."""


class LayerStorage:
    """One layer's keys and values: (slots, kv_heads, capacity, head_dim) each.

    What lies beyond a slot's written positions is not initialised until a pass may read it: a key
    that a mask hides still enters a product with zero, and must be finite.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: int, capacity: int) -> None:
        self.keys, self.values = (self._empty(given, slots, capacity) for given in (keys, values))
        self.finite = [0] * slots
        """Positions of each slot, from the first on, that hold numbers."""

    @staticmethod
    def _empty(like: Tensor, slots: int, capacity: int) -> Tensor:
        return like.new_empty(slots, like.shape[1], capacity, like.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.keys.nbytes + self.values.nbytes

    def grow(self, slots: int, capacity: int) -> None:
        """Make room for more slots, or longer ones; what is written stays."""
        used, old = max(self.finite), len(self.finite)
        grown = []
        for tensor in (self.keys, self.values):
            larger = self._empty(tensor, slots, capacity)
            larger[:old, :, :used] = tensor[:, :, :used]
            grown.append(larger)
        self.keys, self.values = grown
        self.finite += [0] * (slots - old)

    def exchange(
        self, positions: Positions, rows: slice | Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values, and return all that its queries may read.

        Args:
            positions: Of the pass.
            rows: Its slots: a slice where they lie side by side, and are read where they are;
                others are gathered.
            keys: (batch, kv_heads, width, head_dim).
            values: (batch, kv_heads, width, head_dim).

        Returns:
            Two of (batch, kv_heads, end, head_dim).
        """
        first, width, end = positions.starts[0], positions.width, positions.end
        if positions.aligned and type(rows) is slice:
            here = slice(first, first + width)
            self.keys[rows, :, here] = keys
            self.values[rows, :, here] = values
        else:
            index, places = positions.rows(keys.device), positions.indices.to(keys.device)
            self.keys[index, :, places] = keys.transpose(1, 2).to(self.keys.dtype)
            self.values[index, :, places] = values.transpose(1, 2).to(self.values.dtype)
        finite = self.finite
        for slot, start in zip(positions.slots, positions.starts, strict=True):
            # In most passes only what was written is new, and a layer costs no call more.
            if finite[slot] == start:
                finite[slot] = start + width
            if finite[slot] < end:
                self.make_finite(positions)
                break
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    def make_finite(self, positions: Positions) -> None:
        """Make all that a pass may read hold numbers, but for what it writes itself.

        Args:
            positions: Of the pass.
        """
        finite, width, end = self.finite, positions.width, positions.end
        for slot, start in zip(positions.slots, positions.starts, strict=True):
            written = start + width
            if finite[slot] < written:
                if finite[slot] < start:
                    self._clear(slot, finite[slot], start)
                finite[slot] = written
            if finite[slot] < end:
                self._clear_block(slot, end)

    def _clear_block(self, slot: int, end: int) -> None:
        """Make a slot's positions hold numbers up to the end of the block that an end is in."""
        block_end = -(-end // BLOCK_POSITIONS) * BLOCK_POSITIONS
        upto = min(block_end, self.keys.shape[2])
        self._clear(slot, self.finite[slot], upto)
        self.finite[slot] = upto

    def _clear(self, slot: int, start: int, end: int) -> None:
        self.keys[slot, :, start:end] = 0
        self.values[slot, :, start:end] = 0
