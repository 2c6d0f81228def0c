"""The rotary family: Llama, Mistral, Qwen2, Qwen3, and Qwen2-VL with positions in three axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.language.cache import KeyValueCache, Span
from fastvlm.language.decoder import DecoderShape, FeedForward, LayeredDecoder, layers_of


class RotaryDecoder(LayeredDecoder):
    """A decoder whose layers rotate queries and keys by their positions.

    Args:
        decoder: A `LlamaModel` or one of the same parts: `embed_tokens`, `layers`, `norm` and
            `rotary_emb`.
        lm_head: The LM head.
    """

    def __init__(self, decoder: Any, lm_head: nn.Linear) -> None:
        super().__init__(decoder, lm_head, decoder.layers)
        # Which fields a configuration has is its family's matter.
        config: Any = decoder.config
        self.width = config.hidden_size
        self.context = config.max_position_embeddings
        self.kv_heads = config.num_key_value_heads
        self.head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.window: int | None = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        self.slides = [
            self.window is not None and (kinds is None or kinds[index] == "sliding_attention")
            for index in range(self.depth)
        ]
        # Frequencies that change with the length (dynamic NTK, LongRoPE) can't be tabulated.
        self.tabulates = config.rope_parameters["rope_type"] not in {"dynamic", "longrope"}
        self._rotations: tuple[Tensor, Tensor] | None = None
        self._own_rotations: tuple[Tensor, Tensor, Tensor] | None = None

    @staticmethod
    def shape(config: Any) -> DecoderShape:
        """Return the shape of the decoder of a configuration."""
        return DecoderShape(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.rms_norm_eps,
        )

    @staticmethod
    def blocks(config: Any, number: int, first_index: int) -> nn.ModuleList:
        """Return untrained layers of the family, which cache as layers from `first_index` on."""
        fields = {name: v for name, v in config.to_dict().items() if name != "layer_types"}
        layers = layers_of(type(config)(**{**fields, "num_hidden_layers": number})).layers
        for offset, layer in enumerate(layers):
            layer.self_attn.layer_idx = first_index + offset
        return layers

    @staticmethod
    def feed_forward(layer: Any) -> FeedForward:
        """Return a layer's gated feed-forward part."""
        return FeedForward(
            layer.post_attention_layernorm.weight,
            layer.mlp.gate_proj.weight,
            layer.mlp.up_proj.weight,
            layer.mlp.down_proj.weight,
        )

    def run(self, x: Tensor, span: Span, cache: KeyValueCache, layers: Iterable[int]) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states."""
        return self._run(
            x, span, cache, [(self.layers[index], self.slides[index]) for index in layers]
        )

    def run_blocks(
        self, x: Tensor, span: Span, cache: KeyValueCache, blocks: Iterable[nn.Module]
    ) -> Tensor:
        """Run layers of the target's own kind that are not the target's."""
        return self._run(x, span, cache, [(block, self.slides[-1]) for block in blocks])

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of hidden states."""
        return self.decoder.norm(x)

    def _run(
        self, x: Tensor, span: Span, cache: KeyValueCache, layers: Sequence[tuple[nn.Module, bool]]
    ) -> Tensor:
        cache.write_at(span)
        rotary = self._rotary(x, span)
        slides = any(slides for _, slides in layers)
        masks = self.mask(x, span), self.mask(x, span, self.window) if slides else None
        for layer, sliding in layers:
            x = layer(
                x,
                attention_mask=masks[sliding],
                position_ids=span.positions,
                past_key_values=cache,
                position_embeddings=rotary,
                use_cache=True,
            )
        return x

    def _rotary(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of a span: (batch, width, head_dim) each."""
        if span.table is not None:
            return self._own_rotary(x, span, span.table)
        if not self.tabulates:
            return self.decoder.rotary_emb(x, span.positions)
        if self._rotations is None or len(self._rotations[0]) < span.end:
            size = max(span.end, min(self.context, 2048))
            cos, sin = self._rotate(x, torch.arange(size, device=self.device)[None])
            self._rotations = cos[0], sin[0]
        cos, sin = self._rotations
        if span.aligned:
            first = span.starts[0]
            return cos[None, first : first + span.width], sin[None, first : first + span.width]
        return cos[span.positions], sin[span.positions]

    def _own_rotary(self, x: Tensor, span: Span, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of rows with positions of their own."""
        rows = torch.arange(len(span.starts), device=self.device)[:, None]
        if not self.tabulates:
            return self.decoder.rotary_emb(x, table[:, rows, span.positions])
        # A cache has one table as long as its rows have the same requests.
        if self._own_rotations is None or self._own_rotations[0] is not table:
            self._own_rotations = table, *self._rotate(x, table)
        _, cos, sin = self._own_rotations
        if span.aligned:
            first = span.starts[0]
            return cos[:, first : first + span.width], sin[:, first : first + span.width]
        return cos[rows, span.positions], sin[rows, span.positions]

    def _rotate(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of positions: (batch, positions, head_dim) each."""
        # Decoding fills the tables, and training reads them too.
        with torch.inference_mode(mode=False), torch.no_grad():
            like = torch.empty(0, dtype=x.dtype, device=self.device)
            return self.decoder.rotary_emb(like, positions)
