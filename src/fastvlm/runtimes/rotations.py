"""The rotations of a decoder as graphs take them: half of each head's cosines and sines."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from fastvlm.functional.errors import InputError
from fastvlm.language.general import GeneralDecoder
from fastvlm.language.layer_calls import RotaryKind
from fastvlm.language.positions import Positions
from fastvlm.runtimes.layer_form import Rotation

CPU = torch.device("cpu")
SEEN = 8
"""Positions whose rotations show what those of a kind are like."""


class GraphRotations:
    """A decoder's rotations, by the names of their tables (`Rotation.tables`).

    Args:
        split: The decoder in torch.

    Raises:
        InputError: It rotates by other tables than cosines and sines.
    """

    def __init__(self, split: GeneralDecoder) -> None:
        self.split = split
        self.kinds = {
            kind: self._rotation(number, kind) for number, kind in enumerate(split.rotary)
        }
        """What those of each kind are like."""
        self._tables: tuple[int, dict[str, Tensor]] = 0, {}

    def of(self, positions: Positions, capacity: int) -> Mapping[str, Tensor]:
        """Return the rotations of a pass.

        Where they are a matter of the positions' numbers alone, they are those of all positions,
        always the same tables: (capacity or more, size); else (batch or 1, width, size).

        Args:
            positions: The pass.
            capacity: Positions of the cache.
        """
        static = all(rotary.is_static for rotary in self.split.rotary.values())
        if not static or positions.position_ids is not None:
            return self._made(positions)
        if self._tables[0] < capacity:
            made = self._made(Positions.whole([capacity], CPU))
            self._tables = capacity, {name: one[0].contiguous() for name, one in made.items()}
        return self._tables[1]

    def _made(self, positions: Positions) -> dict[str, Tensor]:
        """Return the rotations of a pass as the model makes them: (batch or 1, width, size)."""
        found: dict[str, Tensor] = {}
        for kind, rotation in self.kinds.items():
            tables = self.split.rotary[kind](torch.empty(0), positions)
            for name, table in zip(rotation.tables, tables, strict=True):
                each = table[..., ::2] if rotation.interleaved else table.chunk(2, -1)[0]
                found[name] = each
        return found

    @property
    def state(self) -> Hashable:
        """What changes whenever tables of all positions would: the frequencies, a few numbers."""
        modules = [rotary.module for rotary in self.split.rotary.values() if rotary.is_static]
        return tuple(tuple(one.tolist()) for module in modules for one in module.buffers())

    def forget(self) -> None:
        """Make the tables of all positions anew where they are next asked for."""
        self._tables = 0, {}

    def _rotation(self, number: int, kind: RotaryKind) -> Rotation:
        """Return what rotations of a kind are like, by those of the first positions."""
        positions = Positions.whole([SEEN], CPU)
        found = self.split.rotary[kind](torch.zeros(1, SEEN, self.split.width), positions)
        if isinstance(found, tuple) and [one.dim() for one in found] == [3, 3]:
            table, size = found[0], found[0].shape[-1]
            if torch.equal(*table.chunk(2, -1)):
                return Rotation(number, size, interleaved=False)
            if torch.equal(table[..., ::2], table[..., 1::2]):
                return Rotation(number, size, interleaved=True)
        raise InputError("it rotates by other tables than cosines and sines")
