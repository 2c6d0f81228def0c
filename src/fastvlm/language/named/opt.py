"""OPT, as in BLIP-2: learnt positions, which are added to the embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.language.cache import KeyValueCache
from fastvlm.language.decoder import DecoderShape, SplitDecoder, cache_name
from fastvlm.language.positions import Positions
from fastvlm.language.untrained import untrained_layers


class OptDecoder(SplitDecoder):
    """The decoder of OPT.

    Args:
        model: The model that the decoder is part of.
        decoder: An `OPTDecoder`.
    """

    max_positions: int

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        super().__init__(model, decoder)
        self.width = decoder.config.hidden_size
        # Positions are learnt, so there are no others.
        self.context = self.max_positions = decoder.config.max_position_embeddings

    @staticmethod
    def shape(config: Any) -> DecoderShape:
        """Return the shape of the decoder of a configuration."""
        # OPT's norms have PyTorch's default.
        return DecoderShape(config.num_hidden_layers, config.hidden_size, config.ffn_dim, 1e-5)

    @staticmethod
    def blocks(config: Any, number: int, first_index: int) -> nn.ModuleList:
        """Return untrained layers of the family, which cache as layers from `first_index` on."""
        return untrained_layers(config, number, first_index, "decoder.layers")

    @staticmethod
    def feed_forward(layer: Any) -> None:  # noqa: ARG004
        """Return None: OPT's feed-forward part has no gate."""
        return

    def forward_layers(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Iterable[int]
    ) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states.

        Before layer 0, embeddings are projected to d_model and their positions are added.
        """
        indices = list(layers)
        if indices and indices[0] == 0:
            x = self._placed(x, positions)
        return self._run(x, positions, cache, [self.layers[index] for index in indices])

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
        """Return the final norm of hidden states, projected to the embeddings' size."""
        if self.decoder.final_layer_norm is not None:
            x = self.decoder.final_layer_norm(x)
        return x if self.decoder.project_out is None else self.decoder.project_out(x)

    def _placed(self, x: Tensor, positions: Positions) -> Tensor:
        """Return embeddings as hidden states that know their positions."""
        if self.decoder.project_in is not None:
            x = self.decoder.project_in(x)
        # What is drafted past a row's limit is never accepted, but is computed beside other rows.
        indices = positions.indices.clamp(max=self.max_positions - 1)
        return x + self.decoder.embed_positions(None, position_ids=indices)

    def _run(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Sequence[nn.Module]
    ) -> Tensor:
        cache.begin_pass(positions)
        mask = self.mask(x, positions)
        for layer in layers:
            held = {cache_name(layer): cache}
            x = layer(x, attention_mask=mask, use_cache=True, **held)
        return x
