"""The decoder of a checkpoint, split at any layer, and the cache that its layers talk to."""

from fastvlm.language.cache import DecoderCache, Span
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.families import split_decoder
from fastvlm.language.prompt import Prompt, captured

__all__ = ["DecoderCache", "Prompt", "Span", "SplitDecoder", "captured", "split_decoder"]
