"""What computes a decoder: torch, ONNX Runtime or CUDA graphs, behind the same `SplitDecoder`."""

from fastvlm.runtimes.runtime import (
    RUNTIMES,
    RuntimeOptions,
    decoder_of,
    draft_runner_of,
    split_load_options,
)

__all__ = ["RUNTIMES", "RuntimeOptions", "decoder_of", "draft_runner_of", "split_load_options"]
