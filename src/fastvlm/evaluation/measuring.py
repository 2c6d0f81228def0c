"""How replies are measured: one at a time, image included, strategies in rotating order."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from fastvlm.data.questions import Question
from fastvlm.decoding import Engine, Request, SamplingParams, Strategy
from fastvlm.functional.errors import InputError
from fastvlm.functional.messages import Message
from fastvlm.functional.statistics import DecodingStatistics, Spread
from fastvlm.vision.loading import ImageInput
from fastvlm.vlm import VisionLanguageModel

DEFAULT_SAMPLING_PARAMS = SamplingParams(max_new_tokens=160)
"""How replies are decoded by default."""


def no_progress(done: int, total: int) -> None:
    """Do nothing."""
    del done, total


def refuse(question: Question, error: InputError) -> None:
    """Raise the error of a question that can't be asked.

    Raises:
        InputError: Always.
    """
    del question
    raise error


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Return the names in an order that rotates with the question's number."""
    turn = number % len(names)
    return [*names[turn:], *names[:turn]]


def run_request(
    vlm: VisionLanguageModel,
    strategy: Strategy,
    prompt: str | Sequence[Message],
    image: ImageInput | None = None,
    **options: Any,
) -> Request:
    """Decode one request, with its image encoded anew, and return it.

    Args:
        vlm: The model.
        strategy: The strategy.
        prompt: See `VisionLanguageModel.request`.
        image: See `VisionLanguageModel.request`.
        options: See `VisionLanguageModel.request`.

    Raises:
        InputError: As `VisionLanguageModel.request`, or the prompt doesn't fit into the model's
            context.
    """
    # Every strategy pays for its image.
    vlm.lru.clear()
    request = vlm.request(prompt, image, strategy=strategy, **options)
    return run_requests(vlm.engine, [request])[0]


def run_requests(engine: Engine, requests: Iterable[Request]) -> list[Request]:
    """Decode requests together, and return them in order.

    Args:
        engine: The engine.
        requests: The requests, read as slots become free.

    Raises:
        Exception: The error of a request that failed.
    """
    done = engine.run_all(requests)
    for request in done:
        if request.error is not None:
            raise request.error
    return done


def speedup(
    slow: Sequence[DecodingStatistics], fast: Sequence[DecodingStatistics], *, whole: bool = False
) -> Spread | None:
    """Return the speedup over other replies, question by question.

    Args:
        slow: The replies to compare with.
        fast: The replies to the same questions.
        whole: Whether to compare the time of whole replies, image and prefill included, instead of
            the time per output token after the first.

    Returns:
        None where no reply has more than one token.
    """
    ratios = [
        one.total_ms / other.total_ms if whole else one.tpot_ms / other.tpot_ms
        for one, other in zip(slow, fast, strict=True)
        if one.tpot_ms is not None and other.tpot_ms is not None
    ]
    return Spread.of(ratios) if ratios else None


def hardware(device: torch.device | None = None, runtime: str = "torch") -> dict[str, Any]:
    """Return a description of the hardware and the versions of libraries.

    Args:
        device: The device that was used; None for the accelerator, if there is one.
        runtime: What computed the decoder, see `RuntimeOptions`.
    """
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": _accelerator(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"onnxruntime": version("onnxruntime")} if runtime == "onnx" else {}),
    }


def _accelerator(device: torch.device | None) -> str | None:
    """Return the name of a device; None for the CPU."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return None if device.type == "cpu" else device.type


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
