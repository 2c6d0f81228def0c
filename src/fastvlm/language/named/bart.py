"""BART, as in Florence-2, and its relatives: cross-attention, and positions in a table."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.language.decoder import DecoderShape
from fastvlm.language.general import GeneralDecoder
from fastvlm.language.named.placed import PlacedDecoder
from fastvlm.language.untrained import untrained_layers


class BartDecoder(PlacedDecoder):
    """The decoder of BART, mBART, Marian, Pegasus, Blenderbot and others. See `GeneralDecoder`.

    Some scale embeddings, some norm them with their positions, some norm what the last layer gives.
    """

    PARTS: ClassVar = ("embed_tokens", "embed_positions", "layers")

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        # Positions stand in a table, so there are no others.
        self.max_positions = decoder.config.max_position_embeddings
        super().__init__(model, decoder)

    @staticmethod
    def shape(config: Any) -> DecoderShape:
        """Return the shape of the decoder of a configuration."""
        # BART's norms have PyTorch's default.
        return DecoderShape(config.decoder_layers, config.hidden_size, config.decoder_ffn_dim, 1e-5)

    @staticmethod
    def blocks(config: Any, number: int, first_index: int) -> nn.ModuleList:
        """Return untrained layers of the family, which cache as layers from `first_index` on."""
        return untrained_layers(config, number, first_index, "decoder.layers")

    def placed(self, x: Tensor, places: Tensor) -> Tensor:
        """Return embeddings with their positions. See `PlacedDecoder`."""
        # Where the embedding scales itself, the decoder has no such attribute.
        x = x * getattr(self.decoder, "embed_scale", 1.0) + self.rows(places)
        norm = getattr(self.decoder, "layernorm_embedding", None)
        return x if norm is None else norm(x)

    def rows(self, places: Tensor) -> Tensor:
        """Return what stands for positions in the table: (batch or 1, new, d_model)."""
        table = self.decoder.embed_positions
        return table.weight[places + getattr(table, "offset", 0)]

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of hidden states, or themselves where each layer ends with one."""
        norm = getattr(self.decoder, "layer_norm", None)
        return x if norm is None else norm(x)

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


class BlenderbotSmallDecoder(BartDecoder):
    """The decoder of Blenderbot's small models, which norms embeddings without positions."""

    def placed(self, x: Tensor, places: Tensor) -> Tensor:
        """Return embeddings with their positions. See `PlacedDecoder`."""
        return self.decoder.layernorm_embedding(x) + self.rows(places)


class BioGptDecoder(BartDecoder):
    """The decoder of BioGPT, which stands alone."""

    shape = staticmethod(GeneralDecoder.shape)
    blocks = staticmethod(GeneralDecoder.blocks)


class M2m100Decoder(BartDecoder):
    """The decoder of M2M100, NLLB-MoE and SeamlessM4T, whose table of positions grows."""

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        super().__init__(model, decoder)
        self.max_positions = None

    def rows(self, places: Tensor) -> Tensor:
        """Return what stands for positions in the table: (batch or 1, new, d_model)."""
        table = self.decoder.embed_positions
        found = places + table.padding_idx + 1
        if (needed := int(found.max()) + 1) > len(table.weights):
            table.make_weights(needed + table.offset, table.embedding_dim, table.padding_idx)
        return table.weights[found]
