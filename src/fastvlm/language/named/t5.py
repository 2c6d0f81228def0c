"""T5, as in BLIP-2 with FlanT5: cross-attention to an encoder, and a bias by distance."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.language.cache import KeyValueCache
from fastvlm.language.cross_attention import CrossCache
from fastvlm.language.decoder import (
    DecoderShape,
    FeedForward,
    SplitDecoder,
    cache_name,
)
from fastvlm.language.dense import dense_weight
from fastvlm.language.masks import additive
from fastvlm.language.positions import Positions
from fastvlm.language.untrained import untrained_layers


class T5Decoder(SplitDecoder):
    """The decoder of T5; what its encoder made of a row's source comes with the row's positions.

    Args:
        model: The model that the decoder is part of.
        decoder: A `T5Stack` with `is_decoder`.
    """

    # Distances, not positions, are learnt, and the greatest of them share one bias.
    context = sys.maxsize

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        super().__init__(model, decoder)
        config: Any = decoder.config
        self.width = config.d_model
        # mT5 has no such setting, and doesn't.
        scales = getattr(config, "scale_decoder_outputs", False)
        self.scale: float | None = config.d_model**-0.5 if scales else None

    @property
    def layers(self) -> Any:
        """The target's own layers."""
        return self.decoder.block

    @staticmethod
    def shape(config: Any) -> DecoderShape:
        """Return the shape of the decoder of a configuration."""
        return DecoderShape(
            config.num_decoder_layers, config.d_model, config.d_ff, config.layer_norm_epsilon
        )

    @staticmethod
    def blocks(config: Any, number: int, first_index: int) -> nn.ModuleList:
        """Return untrained layers of the family, which cache as layers from `first_index` on."""
        # A decoder's first layer has the bias of all of them, which stays the target's own.
        fields = {
            **config.to_dict(),
            "num_layers": 1,
            "num_decoder_layers": config.num_decoder_layers + 1,
        }
        return untrained_layers(type(config)(**fields), number, first_index, "decoder.block")

    @staticmethod
    def feed_forward(layer: Any) -> FeedForward | None:
        """Return a layer's gated feed-forward part; None where a T5 has no gate."""
        part = layer.layer[-1]
        inner = part.DenseReluDense
        if not hasattr(inner, "wi_0"):
            return None
        norm = part.layer_norm.weight
        gate, up = (dense_weight(one, len(norm), norm) for one in (inner.wi_0, inner.wi_1))
        return FeedForward(norm, gate, up, dense_weight(inner.wo, len(gate), norm))

    def forward_layers(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Iterable[int]
    ) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states."""
        return self._run(x, positions, cache, [self.layers[index] for index in layers])

    def forward_blocks(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        blocks: Iterable[nn.Module],
        exit_layer: int,  # noqa: ARG002 (nothing is added to states)
    ) -> Tensor:
        """Run layers of the target's own kind that are not the target's."""
        return self._run(x, positions, cache, list(blocks))

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of hidden states, scaled where the LM head is the embeddings'."""
        x = self.decoder.final_layer_norm(x)
        return x if self.scale is None else x * self.scale

    def _run(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Sequence[nn.Module]
    ) -> Tensor:
        if not layers:
            return x
        cache.begin_pass(positions)
        source = positions.encoder
        mask = self._biased_mask(positions)
        # Attention computes a bias of its own unless it is given one; ours is in the mask. Hidden
        # states may be wider than what attention computes in: T5 keeps some weights in float32.
        none = torch.zeros(1, 1, 1, 1, dtype=mask.dtype, device=x.device)
        states = None if source is None else source.states
        seen = None if source is None else additive(source.visible[:, None, None], mask.dtype)
        both: Any = CrossCache(cache, source)
        for layer in layers:
            x, *_ = layer(
                x,
                attention_mask=mask,
                position_bias=none,
                encoder_hidden_states=states,
                encoder_attention_mask=seen,
                encoder_decoder_position_bias=none,
                **{cache_name(layer): both},
            )
        return x

    def _biased_mask(self, positions: Positions) -> Tensor:
        """Return what to add to scores: (batch or 1, heads, width, keys).

        It is the bias of each distance, and the least number for what is not seen.
        """
        first: Any = self.layers[0]
        attention = first.layer[0].SelfAttention
        away = positions.distances
        buckets = attention._relative_position_bucket(
            -away.clamp(min=0),
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias = attention.relative_attention_bias(buckets)
        mask: Tensor = bias.permute(0, 3, 1, 2).to(self.dtype)
        return mask.masked_fill(~positions.visible()[: len(away)], torch.finfo(mask.dtype).min)
