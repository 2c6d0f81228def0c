"""Kosmos-2.5: sinusoidal positions, and an embedding that tells images from text."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fastvlm.language.general import GeneralDecoder
from fastvlm.language.positions import Positions


class Kosmos25Decoder(GeneralDecoder):
    """The decoder of Kosmos-2.5. See `GeneralDecoder`.

    What its embedding adds at the positions of images is an injection of the prompt.
    """

    PARTS: ClassVar = ("embed_tokens", "embed_positions", "segment_emb", "layers", "layer_norm")

    def enter(self, x: Tensor, positions: Positions) -> Tensor:
        """Return embeddings, scaled, with their positions: (batch, new, d_model)."""
        return self._placed(x, positions.indices)

    def first_entry(self) -> Callable[[Tensor], Tensor]:
        """Return what `enter` does to the first positions."""
        return lambda x: self._placed(x, torch.arange(x.shape[1], device=x.device)[None])

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of hidden states."""
        return self.decoder.layer_norm(x)

    def _placed(self, x: Tensor, indices: Tensor) -> Tensor:
        table = self.decoder.embed_positions
        first = table.padding_idx + 1
        positions = indices.expand(x.shape[:2]) + first
        # The table grows with the positions that it is said to begin after.
        past = max(int(indices.max()) + 1 - x.shape[1], 0)
        # By place: releases of transformers differ in what they call the third.
        added = table(None, x, past, positions.contiguous())
        added = added.to(x) + self.decoder.segment_emb.weight[0]
        return x * self.decoder.embed_scale + added
