"""The decoder of a checkpoint, split at any layer, and the cache that its layers talk to."""

from fastvlm.language.cache import DecoderCache
from fastvlm.language.capture import capture_decoder_inputs
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.decoder_inputs import DecoderInputs
from fastvlm.language.families import split_decoder
from fastvlm.language.positions import Positions

__all__ = [
    "DecoderCache",
    "DecoderInputs",
    "Positions",
    "SplitDecoder",
    "capture_decoder_inputs",
    "split_decoder",
]
