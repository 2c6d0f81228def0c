"""Batches of different images: tokens as alone, throughput with drafts and without.

Batches of each size are decoded by every contender before the next batch, in an order that turns.
Run `python benchmarks/batches.py [--photos DIR] [--listing FILE] [--batches N] [--threads N]
[--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import fastvlm
import fastvlm_example
from fastvlm.data.questions import images_in
from fastvlm.decoding import Strategy
from fastvlm.evaluation.measuring import hardware
from fastvlm.functional.statistics import Spread

SIZES = (1, 2, 4, 8)
MAX_NEW_TOKENS = 160


def decode(
    vlm: fastvlm.VisionLanguageModel, strategy: Strategy, images: list[Path]
) -> tuple[list[list[int]], float]:
    """Return the replies, and the seconds after their first tokens."""
    requests = [
        vlm.request(
            fastvlm_example.DESCRIPTION_PROMPT,
            path,
            strategy=strategy,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for path in images
    ]
    for request in vlm.engine.run(requests):
        if request.error is not None:
            raise request.error
    started = max(request.times[0] for request in requests)
    ended = max(request.times[-1] for request in requests)
    return [request.output_token_ids for request in requests], ended - started


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
        paths = [p for p in images_in(options.photos) if p.suffix == ".jpg"]
    else:
        paths = [options.photos / name for name in options.listing.read_text().split()]
    strategies = {"ordinary": vlm.strategy("autoregressive"), "drafts": vlm.strategy("cascade")}
    alone = {
        path: decode(vlm, strategies["ordinary"], [path])[0][0]
        for path in paths[: max(SIZES) * options.batches]
    }
    out: dict[str, Any] = {"hardware": hardware(), "sizes": {}}
    for size in SIZES:
        rates: dict[str, list[float]] = {name: [] for name in strategies}
        for strategy in strategies.values():
            decode(vlm, strategy, paths[:size])
        for number in range(options.batches):
            images = paths[number * size : (number + 1) * size]
            for name in list(strategies)[:: 1 if number % 2 else -1]:
                replies, seconds = decode(vlm, strategies[name], images)
                if replies != [alone[path] for path in images]:
                    raise SystemExit(f"A batch of {size} has other tokens than its images alone.")
                rates[name].append(sum(len(reply) - 1 for reply in replies) / seconds)
        ratio = Spread.of([b / a for a, b in zip(*rates.values(), strict=True)])
        row = {name: Spread.of(values).median for name, values in rates.items()}
        out["sizes"][size] = {
            **row,
            "ratio": ratio.median,
            "ratio_iqr": [ratio.low, ratio.high],
        }
        print(  # noqa: T201
            f"batch of {size}: {row['ordinary']:.0f} tokens/s without drafts,"
            f" {row['drafts']:.0f} with: {ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
