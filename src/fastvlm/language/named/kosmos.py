"""Kosmos-2.5: sinusoidal positions, and an embedding that tells images from text."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastvlm.language.named.placed import PlacedDecoder


class Kosmos25Decoder(PlacedDecoder):
    """The decoder of Kosmos-2.5. See `GeneralDecoder`.

    What its embedding adds at the positions of images is an injection of the prompt.
    """

    PARTS: ClassVar = ("embed_tokens", "embed_positions", "segment_emb", "layers", "norm")

    def placed(self, x: Tensor, places: Tensor) -> Tensor:
        """Return embeddings, scaled, with their positions. See `PlacedDecoder`."""
        table = self.decoder.embed_positions
        first = table.padding_idx + 1
        positions = places.expand(x.shape[:2]) + first
        # The table grows with the positions that it is said to begin after.
        past = max(int(places.max()) + 1 - x.shape[1], 0)
        # By place: releases of transformers differ in what they call the third.
        added = table(None, x, past, positions.contiguous())
        added = added.to(x) + self.decoder.segment_emb.weight[0]
        return x * self.decoder.embed_scale + added
