"""UMT5: T5 with a bias of its own in each layer, which the layer computes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.language.cache import KeyValueCache
from fastvlm.language.cross_attention import CrossCache
from fastvlm.language.masks import additive
from fastvlm.language.named.t5 import T5Decoder
from fastvlm.language.positions import Positions


class Umt5Decoder(T5Decoder):
    """The decoder of UMT5. See `T5Decoder`."""

    def _run(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Sequence[nn.Module]
    ) -> Tensor:
        # Layers count distances from where the pass begins, for all rows alike.
        if not positions.aligned:
            rows = [
                self._run(x[row : row + 1], positions.of_row(row), cache, layers)
                for row in range(len(x))
            ]
            return torch.cat(rows)
        if not layers:
            return x
        cache.begin_pass(positions)
        source = positions.encoder
        both: Any = CrossCache(cache, source)
        mask = additive(positions.visible(), x.dtype)
        states = None if source is None else source.states
        seen = None if source is None else additive(source.visible[:, None, None], x.dtype)
        for layer in layers:
            x = layer(x, mask, states, encoder_attention_mask=seen, past_key_values=both)
        return x
