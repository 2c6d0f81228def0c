"""Decoding: the engine, its cycle of draft, verify, accept and commit, and the strategies."""

from fastvlm.decoding.engine import Engine
from fastvlm.decoding.layer_skip import LayerSkip
from fastvlm.decoding.request import Request, TokenLogprob
from fastvlm.decoding.sampler import Sampler
from fastvlm.decoding.sampling_params import SamplingParams
from fastvlm.decoding.self_speculative import SelfSpeculative
from fastvlm.decoding.strategies import (
    Autoregressive,
    PromptLookup,
    Strategy,
)
from fastvlm.decoding.structured import StructuredOutput

__all__ = [
    "Autoregressive",
    "Engine",
    "LayerSkip",
    "PromptLookup",
    "Request",
    "Sampler",
    "SamplingParams",
    "SelfSpeculative",
    "Strategy",
    "StructuredOutput",
    "TokenLogprob",
]
