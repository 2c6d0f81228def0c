"""What the cost model predicts for a model, beside what was measured of it.

    S = E * (L*l + h) / (g * (k*l + c + h_d) + k*l + (L-k)*l*(1+e) + h + o)

One ordinary step has the cost L*l + h, a drafted token k*l + c + h_d, and the rest of the
denominator is the verify, of which e is the extra cost of its width. The three are timed alone
here, on a cache as long as a reply's; E (acceptance length), g (draft length) and the measured
speedup are those of `benchmarks/results`. Overhead of the cycle itself (o) is left out, so the
prediction is an upper bound.

Run `python benchmarks/cost_model.py [RESULT ...] [--model DIR --draft DIR] [--threads N]
[--json FILE]`; the results are files of `fastvlm benchmark --json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

import fastvlm
from fastvlm.decoding import Request
from fastvlm.decoding.batch import Batch
from fastvlm.decoding.slot import ExitStates, Slot
from fastvlm.evaluation.measuring import hardware
from fastvlm.language import DecoderInputs

RESULTS = Path(__file__).parent / "results"
CONTEXT = 90
"""Positions in the cache: a prompt and half a reply."""
ROUNDS = 60


@torch.inference_mode()
def costs(vlm: fastvlm.VisionLanguageModel, draft_length: int) -> tuple[float, float, float]:
    """Return the milliseconds of an ordinary step, of a drafted token and of a verify."""
    decoder = vlm.decoder
    strategy = vlm.strategy("imitation", num_speculative_tokens=draft_length, confidence=0.0)
    cache = decoder.cache(1, CONTEXT + draft_length + 1)
    cache.assign(0, DecoderInputs([0] * CONTEXT, torch.empty(CONTEXT, 0)))
    prompt = torch.ones(CONTEXT, dtype=torch.long, device=decoder.device)
    inputs = DecoderInputs(prompt.tolist(), decoder.embed(prompt))
    request = Request(inputs, strategy, CONTEXT + draft_length, output_token_ids=[1])
    # As if a prompt had been computed, and the network had seen all of it.
    exits = ExitStates(kept=False) if strategy.cache_layers else None
    slot = Slot(0, request, exits, prefilled=CONTEXT, length=CONTEXT, drafted_length=CONTEXT)
    batch = Batch(decoder, cache, [slot], time.perf_counter)

    def whole_pass(width: int) -> None:
        x = decoder.embed(torch.ones(1, width, dtype=torch.long, device=decoder.device))
        positions = cache.positions([CONTEXT], width)
        x = decoder.forward_layers(x, positions, cache, range(decoder.depth))
        decoder.head(x).argmax(-1).tolist()

    parts: dict[str, Callable[[], object]] = {
        "ordinary": lambda: whole_pass(1),
        "draft": lambda: strategy.draft(batch, [draft_length]),
        "verify": lambda: whole_pass(draft_length + 1),
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            taken[name].append(1e3 * (time.perf_counter() - started))
    ordinary, draft, verify = (statistics.median(taken[name]) for name in parts)
    return ordinary, draft / draft_length, verify


def main() -> None:
    """Print one paragraph for each result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [RESULTS / "scenes.json", RESULTS / "photos.json"]
    parser.add_argument("results", type=Path, nargs="*", default=usual)
    parser.add_argument("--model", help="the model of the results, if not the example model")
    parser.add_argument("--draft")
    parser.add_argument("--threads", type=int, help="CPU threads to compute with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    vlm = fastvlm.load(options.model, draft=options.draft)
    runs = []
    for file in options.results:
        rows = {row["strategy"]: row for row in json.loads(file.read_text())["results"]}
        row = rows["imitation"]
        g, e = row["draft_length"], row["acceptance_length"]
        ordinary, draft, verify = costs(vlm, round(g))
        print(  # noqa: T201
            f"{file.stem}: an ordinary step {ordinary:.2f} ms, a drafted token {draft:.2f} ms, the"
            f" verify of {round(g) + 1} tokens {verify:.2f} ms. With the acceptance length {e:.2f}"
            f" at draft length {g:.1f} the model predicts"
            f" {(predicted := e * ordinary / (g * draft + verify)):.2f}x; measured:"
            f" {row['speedup']:.2f}x."
        )
        low, high = row["speedup_iqr"]
        runs.append(
            {
                "images": "photos" if "photos" in file.stem else "scenes",
                "ordinary_ms": ordinary,
                "drafted_ms": draft,
                "verify_ms": verify,
                "draft_length": g,
                "acceptance_length": e,
                "predicted": predicted,
                "speedup": {"median": row["speedup"], "low": low, "high": high},
            }
        )
    record = {
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": sum(parameter.numel() for parameter in vlm.model.parameters()),
        "layers": vlm.decoder.depth,
        "runs": runs,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
