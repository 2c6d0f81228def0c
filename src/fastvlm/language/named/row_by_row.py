"""Decoders whose layers count positions themselves, for all rows of a pass alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvlm.language.cache import KeyValueCache
from fastvlm.language.general import GeneralDecoder
from fastvlm.language.layer_calls import LayerCall
from fastvlm.language.positions import Positions


class RowByRow(GeneralDecoder):
    """A decoder whose layers take rows that start at different positions one at a time."""

    def is_apart(self, positions: Positions) -> bool:
        """Return whether the rows of a pass go through the layers one at a time."""
        return not positions.aligned

    def _run(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        layers: Sequence[tuple[Any, LayerCall, int | None]],
    ) -> Tensor:
        if not self.is_apart(positions):
            return super()._run(x, positions, cache, layers)
        rows = [
            super(RowByRow, self)._run(x[row : row + 1], positions.of_row(row), cache, layers)
            for row in range(len(x))
        ]
        return torch.cat(rows)
