"""Llama 4: of the usual form, but layers without rotations scale queries by their positions."""

from __future__ import annotations

from fastvlm.language.named.row_by_row import RowByRow
from fastvlm.language.positions import Positions


class Llama4Decoder(RowByRow):
    """The decoder of Llama 4.

    Its layers count positions from where the cache says that the pass begins, for all rows alike.
    The scale is 1 for the first `floor_scale` positions (8,192); only beyond them do rows that
    start at different positions go through the layers one at a time.
    """

    def is_apart(self, positions: Positions) -> bool:
        """Return whether the rows of a pass go through the layers one at a time."""
        config = self.decoder.config
        scales = config.attn_temperature_tuning and positions.end >= config.floor_scale
        return scales and not positions.aligned
