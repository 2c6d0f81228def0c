"""Llama 4: of the usual form, but layers without rotations scale queries by their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvlm.language.cache import KeyValueCache
from fastvlm.language.general import GeneralDecoder
from fastvlm.language.layer_calls import LayerCall
from fastvlm.language.positions import Positions


class Llama4Decoder(GeneralDecoder):
    """The decoder of Llama 4.

    Its layers count positions from where the cache says that the pass begins, for all rows alike.
    The scale is 1 for the first `floor_scale` positions (8,192); only beyond them do rows that
    start at different positions go through the layers one at a time.
    """

    def _run(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        layers: Sequence[tuple[Any, LayerCall, int | None]],
    ) -> Tensor:
        config = self.decoder.config
        scales = config.attn_temperature_tuning and positions.end >= config.floor_scale
        if positions.aligned or not scales:
            return super()._run(x, positions, cache, layers)
        rows = [
            super(Llama4Decoder, self)._run(x[row : row + 1], positions.of_row(row), cache, layers)
            for row in range(len(x))
        ]
        return torch.cat(rows)
