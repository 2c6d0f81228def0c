"""GPT-2 and its relatives: learnt positions, which are added to the embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.language.named.placed import PlacedDecoder
from fastvlm.language.named.row_by_row import RowByRow
from fastvlm.language.positions import Positions


class Gpt2Decoder(PlacedDecoder):
    """The decoder of GPT-2 and GPT-BigCode. See `GeneralDecoder`."""

    PARTS: ClassVar = ("embed_tokens", "wpe", "layers", "norm")

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        # Positions are learnt, so there are no others.
        self.max_positions = decoder.config.max_position_embeddings
        super().__init__(model, decoder)

    def placed(self, x: Tensor, places: Tensor) -> Tensor:
        """Return embeddings with their positions. See `PlacedDecoder`."""
        return x + self.decoder.wpe(places)


class GptNeoDecoder(RowByRow, Gpt2Decoder):
    """The decoder of GPT-Neo, whose layers take a pass's positions for the last keys there are."""

    def is_apart(self, positions: Positions) -> bool:
        """Return whether the rows of a pass go through the layers one at a time."""
        ends = {start + positions.width for start in positions.starts}
        return ends != {positions.end}
