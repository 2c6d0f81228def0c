"""How replies are measured: alone, paying for their pictures, strategies in turns."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers

from fastvlm.decoding import Decoding, Drafter, Request
from fastvlm.functional.statistics import DecodingStatistics, Spread
from fastvlm.vision.pictures import Picture
from fastvlm.vlm import RequestOptions, VisionLanguageModel


def no_progress(done: int, total: int) -> None:
    """Show nothing."""
    del done, total


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """Return who answers a question in what order: each is first as often as any other."""
    turn = number % len(names)
    return [*names[turn:], *names[:turn]]


def answered(
    vlm: VisionLanguageModel,
    drafter: Drafter,
    prompt: str,
    picture: Picture,
    **options: Unpack[RequestOptions],
) -> Request:
    """Return a request that one strategy has answered.

    Raises:
        InputError: As `VisionLanguageModel.request`.
    """
    # Every strategy pays for its picture.
    vlm.lru.clear()
    request = vlm.request(prompt, picture, **options)
    for _ in Decoding(vlm.decoder, drafter, [request]):
        pass
    return request


def speedup(
    slow: Sequence[DecodingStatistics], fast: Sequence[DecodingStatistics], *, whole: bool = False
) -> Spread | None:
    """Return how many times sooner replies are there, question by question.

    Args:
        slow: The replies to compare with.
        fast: The same questions' replies.
        whole: Whether whole replies are timed, picture and prefill included, or the time per output
            token after the first, which a reply of one token doesn't have.

    Returns:
        None, where no reply has more than one token.
    """
    ratios = [
        one.total_ms / other.total_ms if whole else one.tpot_ms / other.tpot_ms
        for one, other in zip(slow, fast, strict=True)
        if one.tpot_ms is not None and other.tpot_ms is not None
    ]
    return Spread.of(ratios) if ratios else None


def hardware() -> dict[str, Any]:
    """Return what the figures were measured on."""
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
