"""Decoders whose layers count positions themselves, for all rows of a pass alike."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.language.general import GeneralDecoder, LayerRun
from fastvlm.language.positions import Positions


class RowByRow(GeneralDecoder):
    """A decoder whose layers take rows that start at different positions one at a time."""

    def is_apart(self, positions: Positions) -> bool:
        """Return whether the rows of a pass go through the layers one at a time."""
        return not positions.aligned

    def _run(self, x: Tensor, run: LayerRun) -> Tensor:
        positions = run.positions
        if not self.is_apart(positions):
            return super()._run(x, run)
        alone = super()._run
        rows = [
            alone(x[row : row + 1], run._replace(positions=positions.of_row(row)))
            for row in range(len(x))
        ]
        return torch.cat(rows)
