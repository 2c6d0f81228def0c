"""A checkpoint's decoder as three calls: embed, run any range of its layers, head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastvlm.language.cache import DecoderCache, KeyValueCache, Span


class SplitDecoder(Protocol):
    """What the cycle needs of a decoder; every family of models gives it."""

    depth: int
    """Layers of the target (L)."""
    width: int
    """Size of the hidden states (d_model)."""
    context: int
    """The most positions that the model was made for."""
    device: torch.device
    dtype: torch.dtype

    def cache(self, batch: int, capacity: int, extra_layers: int = 0) -> DecoderCache:
        """Return an empty cache, with `extra_layers` for an imitation network."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of (batch, new) tokens: (batch, new, d_model)."""
        ...

    def run(self, x: Tensor, span: Span, cache: KeyValueCache, layers: Iterable[int]) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states."""
        ...

    def run_blocks(
        self, x: Tensor, span: Span, cache: KeyValueCache, blocks: Iterable[nn.Module]
    ) -> Tensor:
        """Run layers of the target's own kind that are not the target's."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of hidden states."""
        ...

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, new, d_model): final norm, then LM head."""
        ...

    def head_rows(self, tokens: Tensor) -> Tensor:
        """Return the LM head's rows of some tokens: (tokens, d_model)."""
        ...


class RotaryModel(Protocol):
    """What the decoders of the rotary family have in common in `transformers`."""

    config: PreTrainedConfig
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module


class RotaryDecoder:
    """The rotary family (Llama, Mistral, Qwen2, Qwen3): the checkpoint's own layers, our loop."""

    def __init__(self, decoder: RotaryModel, lm_head: nn.Linear) -> None:
        # Which fields a configuration has is its family's matter.
        config: Any = decoder.config
        self.decoder, self.lm_head = decoder, lm_head
        self.layers: list[nn.Module] = list(decoder.layers)
        self.depth = len(self.layers)
        self.width: int = config.hidden_size
        self.context: int = config.max_position_embeddings
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.device, self.dtype = lm_head.weight.device, lm_head.weight.dtype
        self.window: int | None = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        self.slides = [
            self.window is not None and (kinds is None or kinds[index] == "sliding_attention")
            for index in range(self.depth)
        ]
        # Frequencies that change with the length (dynamic NTK, LongRoPE) can't be tabulated.
        self.tabulates = config.rope_parameters["rope_type"] not in {"dynamic", "longrope"}
        self._table: tuple[Tensor, Tensor] | None = None

    def cache(self, batch: int, capacity: int, extra_layers: int = 0) -> DecoderCache:
        """Return an empty cache, with `extra_layers` for an imitation network."""
        return DecoderCache(
            layers=self.depth + extra_layers,
            batch=batch,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of (batch, new) tokens: (batch, new, d_model)."""
        return self.decoder.embed_tokens(tokens)

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

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, new, d_model): final norm, then LM head."""
        return self.lm_head(self.decoder.norm(x))

    def head_rows(self, tokens: Tensor) -> Tensor:
        """Return the LM head's rows of some tokens: (tokens, d_model)."""
        return self.lm_head.weight[tokens]

    def _run(
        self, x: Tensor, span: Span, cache: KeyValueCache, layers: Sequence[tuple[nn.Module, bool]]
    ) -> Tensor:
        cache.write_at(span)
        rotary = self._rotary(x, span)
        slides = any(slides for _, slides in layers)
        masks = span.mask(), span.mask(self.window) if slides else None
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
        if not self.tabulates:
            return self.decoder.rotary_emb(x, span.positions)
        if self._table is None or len(self._table[0]) < span.end:
            size = max(span.end, min(self.context, 2048))
            # Decoding fills the table, and training reads it too.
            with torch.inference_mode(mode=False), torch.no_grad():
                like = torch.empty(0, dtype=x.dtype, device=self.device)
                cos, sin = self.decoder.rotary_emb(
                    like, torch.arange(size, device=self.device)[None]
                )
            self._table = cos[0], sin[0]
        cos, sin = self._table
        if span.aligned:
            first = span.starts[0]
            return cos[None, first : first + span.width], sin[None, first : first + span.width]
        return cos[span.positions], sin[span.positions]
