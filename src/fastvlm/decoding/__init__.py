"""Decoding: the cycle of drafting, verifying, accepting and committing, and its strategies."""

from fastvlm.decoding.cycle import Decoding
from fastvlm.decoding.request import Request
from fastvlm.decoding.skipping import SkippedLayers
from fastvlm.decoding.strategies import (
    Autoregressive,
    Drafter,
    PromptLookup,
    SelfSpeculative,
)

__all__ = [
    "Autoregressive",
    "Decoding",
    "Drafter",
    "PromptLookup",
    "Request",
    "SelfSpeculative",
    "SkippedLayers",
]
