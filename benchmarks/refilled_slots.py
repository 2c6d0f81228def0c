"""What it is worth that slots are filled again: requests whose replies differ in length by four.

96 requests, eight at a time: through one engine, which admits the next request when one ends, and
batch after batch, as an engine without slots would have them. Both ways turn, and give the same
tokens. The model that ships, with drafts and without; and a text model of 135 million parameters
with random weights, whose step is bound by reading them, as those of models of full size are.

Run `python benchmarks/refilled_slots.py [--rounds N] [--threads N] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastvlm
from fastvlm.data.questions import HELD_OUT_SCENES
from fastvlm.decoding import Autoregressive, Engine, Request
from fastvlm.embedded import SCENE_PROMPT
from fastvlm.evaluation.measuring import hardware
from fastvlm.functional.statistics import Spread
from fastvlm.language import DecoderInputs, split_decoder
from fastvlm.scenes import render, sample

SLOTS, REQUESTS = 8, 96
LIMITS = (20, 40, 60, 80)
"""Tokens of the replies, in turn."""
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
PROMPT = 64


def drain(engine: Engine, requests: list[Request]) -> None:
    """Decode requests to their ends."""
    for request in engine.run(requests):
        if request.error is not None:
            raise request.error


def in_batches(engine: Engine, requests: list[Request]) -> None:
    """Decode requests batch after batch: nobody enters before the last one has left."""
    for first in range(0, len(requests), SLOTS):
        drain(engine, requests[first : first + SLOTS])


WAYS = {"batch after batch": in_batches, "refilled": drain}


def measure(engine: Engine, make: Callable[[], list[Request]], rounds: int) -> dict[str, Any]:
    """Return the throughput of both ways, in tokens per second, and their ratio."""
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    tokens: list[list[list[int]]] = []
    for turn in range(-1, rounds):
        for name in list(WAYS)[:: 1 if turn % 2 else -1]:
            requests = make()
            started = time.perf_counter()
            WAYS[name](engine, requests)
            seconds = time.perf_counter() - started
            tokens.append([request.output_token_ids for request in requests])
            if turn >= 0:
                rates[name].append(sum(map(len, tokens[-1])) / seconds)
    if any(found != tokens[0] for found in tokens):
        raise SystemExit("The two ways gave other tokens.")
    slow, fast = rates.values()
    ratio = Spread.of([b / a for a, b in zip(slow, fast, strict=True)])
    return {
        **{name: Spread.of(found).median for name, found in rates.items()},
        "ratio": ratio.median,
        "ratio_iqr": [ratio.low, ratio.high],
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vlm = fastvlm.load(prefix_bytes=0, max_slots=SLOTS)
    images = [render(sample(HELD_OUT_SCENES + number), 512) for number in range(REQUESTS)]
    cases: dict[str, tuple[Engine, Callable[[], list[Request]]]] = {}
    for name in ("autoregressive", "imitation"):

        def asked(strategy: str = name) -> list[Request]:
            return [
                vlm.request(
                    SCENE_PROMPT, image, strategy=strategy, max_new_tokens=LIMITS[row % len(LIMITS)]
                )
                for row, image in enumerate(images)
            ]

        cases[f"the model that ships, {name}"] = vlm.engine, asked
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    fastvlm.pack_decoder(model)
    prompts = torch.randint(SHAPE["vocab_size"], (REQUESTS, PROMPT)).tolist()
    with torch.no_grad():
        inputs = [
            DecoderInputs(row, model.model.embed_tokens(torch.tensor(row))) for row in prompts
        ]
    ordinary = Autoregressive()

    def written() -> list[Request]:
        return [Request(one, ordinary, LIMITS[row % len(LIMITS)]) for row, one in enumerate(inputs)]

    cases["135 M parameters, autoregressive"] = (
        Engine(split_decoder(model), max_slots=SLOTS),
        written,
    )
    out: dict[str, Any] = {
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "slots": SLOTS,
        "requests": REQUESTS,
        "limits": LIMITS,
        "rounds": options.rounds,
        "cases": {},
    }
    for name, (engine, make) in cases.items():
        found = out["cases"][name] = measure(engine, make, options.rounds)
        low, high = found["ratio_iqr"]
        print(  # noqa: T201
            f"{name}: {found['batch after batch']:.0f} tokens/s batch after batch,"
            f" {found['refilled']:.0f} refilled: {found['ratio']:.2f}x ({low:.2f}-{high:.2f})",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
