"""The decoder of a checkpoint, split at any layer, and the cache that its layers talk to."""

from fastvlm.language.cache import DecoderCache, Positions
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.families import split_decoder
from fastvlm.language.inputs import DecoderInputs, capture_decoder_inputs

__all__ = [
    "DecoderCache",
    "DecoderInputs",
    "Positions",
    "SplitDecoder",
    "capture_decoder_inputs",
    "split_decoder",
]
