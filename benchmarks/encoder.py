"""FastViTHD as our engine runs it, against timm's fused one as `transformers` runs it.

Both get the same random weights and the same images, in turns, and must agree. timm is not part
of fastvlm's environment; `tests/checkpoints/test_timm.py` says how to make one that has it.

Run `python benchmarks/encoder.py [--size 1024] [--dtype float32] [--rounds 7] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, TimmWrapperConfig

from fastvlm.checkpoints.keys import from_timm
from fastvlm.evaluation.measuring import hardware
from fastvlm.functional.statistics import Spread
from fastvlm.language.packed import PACKED_BYTES
from fastvlm.vision import FastViTHD, FastViTHDConfig

SIZES = (256, 512, 768, 1024)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}


def theirs(dtype: torch.dtype) -> nn.Module:
    """Return the vision tower of FastVLM's checkpoints in `transformers`' layout."""
    config = TimmWrapperConfig(
        architecture="fastvit_mci3", model_args={"inference_mode": True}, hidden_size=3072
    )
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            # Activations stay near 1, so that the outputs can be compared.
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return encoder.to(dtype)


def ours(weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Return our encoder for inference, with timm's weights."""
    config = FastViTHDConfig.variant("fastvithd", form="reparameterized")
    encoder = FastViTHD(config)
    encoder.load_state_dict({from_timm(name): weight.float() for name, weight in weights.items()})
    encoder = encoder.fuse().requires_grad_(False).to(dtype)
    encoder.pack(PACKED_BYTES)
    return encoder


@torch.inference_mode()
def measure(size: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time both in turns at a size of image."""
    reference = theirs(dtype)
    prefix = "timm_model."
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in reference.state_dict().items()
        if not name.startswith(f"{prefix}head.")
    }
    encoders = {"transformers and timm": reference, "fastvlm": ours(weights, dtype)}
    times: dict[str, list[float]] = {name: [] for name in encoders}
    error = 0.0
    for turn in range(rounds + 1):
        pixels = torch.rand(1, 3, size, size).to(dtype)
        outputs = []
        for name, encoder in encoders.items():
            started = time.perf_counter()
            outputs.append(encoder(pixels).last_hidden_state)
            times[name].append(1e3 * (time.perf_counter() - started))
        difference = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().mean())
        if not difference < TOLERANCE[dtype]:
            raise SystemExit(f"The outputs differ by {difference:.1e} of their mean.")
        error = max(error, difference)
        if not turn:
            # Kernels are chosen, and memory is asked for, in the first run.
            times = {name: [] for name in encoders}
    ratio = Spread.of([a / b for a, b in zip(*times.values(), strict=True)])
    return {
        "size": size,
        "ms": {name: Spread.of(taken).median for name, taken in times.items()},
        "ratio": [ratio.median, ratio.low, ratio.high],
        "largest_difference": error,
    }


def main() -> None:
    """Measure every size, and print a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, action="append")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = hardware()
    print(f"{machine['processor']}, {machine['threads']} threads, {options.dtype}")  # noqa: T201
    results = []
    for size in options.size or SIZES:
        found = measure(size, getattr(torch, options.dtype), options.rounds)
        results.append(found)
        (slow, fast), (ratio, low, high) = found["ms"].values(), found["ratio"]
        print(  # noqa: T201
            f"{size:5d} px: transformers and timm {slow:8,.1f} ms, fastvlm {fast:8,.1f} ms:"
            f" {ratio:.2f}x ({low:.2f}-{high:.2f}); largest difference"
            f" {found['largest_difference']:.1e} of the mean"
        )
    if options.json:
        figures = {"hardware": machine, "dtype": options.dtype, "results": results}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
