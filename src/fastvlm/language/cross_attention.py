"""What the layers of an encoder-decoder ask of a cache, and what they see of their source."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import EncoderDecoderCache

from fastvlm.language.cache import DecoderCache, KeyValueCache
from fastvlm.language.positions import CrossKeyValues, EncoderContext


class CrossCache(EncoderDecoderCache):
    """What the layers of an encoder-decoder ask of a cache.

    Keys and values of the decoder's own positions are the cache's; those of the source are kept.

    Args:
        cache: Where keys and values of the decoder's positions go.
        source: What cross-attention reads; its keys and values are computed once for a cache that
            keeps anything, by each layer when it first runs.
    """

    def __init__(self, cache: KeyValueCache, source: EncoderContext | None) -> None:
        # The base class wants caches of its own kind, which are what ours stands for.
        self.self_attention_cache: Any = cache
        self.cross_attention_cache: Any = self
        self.source = source if isinstance(cache, DecoderCache) else None
        self.layers: Any = {} if self.source is None else self.source.cross
        self.is_updated = dict.fromkeys(self.layers, True)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values of the source: (batch, heads, source, head_dim)."""
        if self.source is not None:
            self.source.put(layer_idx, CrossKeyValues(key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the first position of a pass, as layers ask that compute a bias themselves."""
        ask = getattr(self.self_attention_cache, "get_seq_length", None)
        return 0 if ask is None else ask(layer_idx)
