"""Batches of different images: tokens as alone, throughput with drafts and without.

Of descriptions of rendered scenes, which drafts mostly get right, and of photos. Batches of each
size are decoded by every contender before the next batch, in an order that turns.
Run `python benchmarks/batches.py [--photos DIR] [--listing FILE] [--batches N] [--threads N]
[--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastvlm
import fastvlm_example
from fastvlm.data.questions import images_in
from fastvlm.decoding import Strategy
from fastvlm.evaluation.measuring import hardware
from fastvlm.functional.statistics import Spread
from fastvlm_example import HELD_OUT_SCENES
from fastvlm_example.scenes import render, sample

SIZES = (1, 2, 4, 8)
MAX_NEW_TOKENS = 160


def decode(
    vlm: fastvlm.VisionLanguageModel, strategy: Strategy, prompt: str, images: Sequence[Any]
) -> tuple[list[list[int]], float]:
    """Return the replies, and the seconds after their first tokens."""
    requests = [
        vlm.request(prompt, image, strategy=strategy, max_new_tokens=MAX_NEW_TOKENS)
        for image in images
    ]
    for request in vlm.engine.run(requests):
        if request.error is not None:
            raise request.error
    started = max(request.times[0] for request in requests)
    ended = max(request.times[-1] for request in requests)
    return [request.output_token_ids for request in requests], ended - started


def measure(
    vlm: fastvlm.VisionLanguageModel, prompt: str, images: Sequence[Any], batches: int
) -> dict[int, dict[str, Any]]:
    """Return the tokens a second of batches of each size, and their ratio with its quartiles.

    Raises:
        SystemExit: An image has other tokens in a batch than alone.
    """
    strategies = {"ordinary": vlm.strategy("autoregressive"), "drafts": vlm.strategy("cascade")}
    alone = [decode(vlm, strategies["ordinary"], prompt, [image])[0][0] for image in images]
    found = {}
    for size in SIZES:
        rates: dict[str, list[float]] = {name: [] for name in strategies}
        for strategy in strategies.values():
            decode(vlm, strategy, prompt, images[:size])
        for number in range(batches):
            here = slice(number * size, (number + 1) * size)
            for name in list(strategies)[:: 1 if number % 2 else -1]:
                replies, seconds = decode(vlm, strategies[name], prompt, images[here])
                if replies != alone[here]:
                    raise SystemExit(f"A batch of {size} has other tokens than its images alone.")
                rates[name].append(sum(len(reply) - 1 for reply in replies) / seconds)
        ratio = Spread.of([b / a for a, b in zip(*rates.values(), strict=True)])
        row = {name: Spread.of(values).median for name, values in rates.items()}
        found[size] = {**row, "ratio": ratio.median, "ratio_iqr": [ratio.low, ratio.high]}
        print(  # noqa: T201
            f"batch of {size}: {row['ordinary']:.0f} tokens/s without drafts,"
            f" {row['drafts']:.0f} with: {ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})",
            flush=True,
        )
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=fastvlm_example.IMAGES)
    parser.add_argument("--listing", type=Path, help="names of the photos to take")
    parser.add_argument("--batches", type=int, default=5, help="batches of each size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vlm = fastvlm.load(prefix_bytes=0)
    if options.listing is None:
        photos = [p for p in images_in(options.photos) if p.suffix == ".jpg"]
    else:
        photos = [options.photos / name for name in options.listing.read_text().split()]
    most = max(SIZES) * options.batches
    size = vlm.image_size
    scenes = [render(sample(HELD_OUT_SCENES + number), size) for number in range(most)]
    out: dict[str, Any] = {"hardware": hardware(), "images": {}}
    for kind, prompt, images in (
        ("scenes", fastvlm_example.SCENE_PROMPT, scenes),
        ("photos", fastvlm_example.DESCRIPTION_PROMPT, photos[:most]),
    ):
        print(kind)  # noqa: T201
        out["images"][kind] = measure(vlm, prompt, images, options.batches)
    if options.json is not None:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
