"""BART, as in Florence-2: cross-attention, learnt positions, norms after each part of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.language.decoder import DecoderShape, untrained_layers
from fastvlm.language.general import GeneralDecoder
from fastvlm.language.positions import Positions


class BartDecoder(GeneralDecoder):
    """The decoder of BART. See `GeneralDecoder`."""

    PARTS: ClassVar = ("embed_tokens", "embed_positions", "layers", "layernorm_embedding")
    max_positions: int

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        # Positions are learnt, so there are no others.
        self.max_positions = decoder.config.max_position_embeddings
        super().__init__(model, decoder)

    @staticmethod
    def shape(config: Any) -> DecoderShape:
        """Return the shape of the decoder of a configuration."""
        # BART's norms have PyTorch's default.
        return DecoderShape(config.decoder_layers, config.d_model, config.decoder_ffn_dim, 1e-5)

    @staticmethod
    def blocks(config: Any, number: int, first_index: int) -> nn.ModuleList:
        """Return untrained layers of the family, which cache as layers from `first_index` on."""
        return untrained_layers(config, number, first_index, "decoder.layers")

    def enter(self, x: Tensor, positions: Positions) -> Tensor:
        """Return embeddings with their positions, normed: (batch, new, d_model)."""
        return self._placed(x, positions.indices)

    def first_entry(self) -> Callable[[Tensor], Tensor]:
        """Return what `enter` does to the first positions."""
        return lambda x: self._placed(x, torch.arange(x.shape[1], device=x.device)[None])

    def norm(self, x: Tensor) -> Tensor:
        """Return hidden states as they are: each layer ends with a norm."""
        return x

    def raw_logits(self, x: Tensor) -> Tensor:
        """Return the LM head's outputs, with the bias that some of the family's models have."""
        bias: Tensor | None = getattr(self.model, "final_logits_bias", None)
        logits: Tensor = self.lm_head(x)
        return logits if bias is None else logits + bias

    def lm_head_rows(self, token_ids: Tensor) -> Tensor | None:
        """Return the LM head's rows of some tokens; None where there is a bias, too."""
        bias: Tensor | None = getattr(self.model, "final_logits_bias", None)
        biased = bias is not None and bool(bias.any())
        return None if biased else super().lm_head_rows(token_ids)

    def _placed(self, x: Tensor, indices: Tensor) -> Tensor:
        # What is drafted past a row's limit is never accepted, but is computed beside other rows.
        indices = indices.clamp(max=self.max_positions - 1)
        table = self.decoder.embed_positions
        return self.decoder.layernorm_embedding(x + table.weight[indices + table.offset])
