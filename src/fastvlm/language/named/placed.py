"""Decoders that add positions to their embeddings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.language.general import GeneralDecoder
from fastvlm.language.positions import Positions


class PlacedDecoder(GeneralDecoder):
    """A decoder that adds positions to its embeddings. See `GeneralDecoder`."""

    @abstractmethod
    def placed(self, x: Tensor, places: Tensor) -> Tensor:
        """Return embeddings, (batch, new, d_model), as the first layer takes them.

        Args:
            x: The embeddings.
            places: Their positions: (batch or 1, new).
        """

    def enter(self, x: Tensor, positions: Positions) -> Tensor:
        """Return embeddings with their positions: (batch, new, d_model)."""
        return self.placed(x, self.places(positions))

    def first_entry(self) -> Callable[[Tensor], Tensor]:
        """Return what `enter` does to the first positions."""
        return lambda x: self.placed(x, torch.arange(x.shape[1], device=x.device)[None])


class TableDecoder(GeneralDecoder):
    """A decoder whose layers read rotations from a table, which ends. See `GeneralDecoder`."""

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        self.max_positions = decoder.config.max_position_embeddings
        super().__init__(model, decoder)
