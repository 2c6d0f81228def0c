"""Time per token with and without a form that the reply is to have, with and without drafts.

The example model describes scenes: freely; as any text at all, which leaves the reply as it is and
shows what a grammar costs; and as JSON of a schema. It has learnt no JSON, and drafts of it are the
worse for that.

Run `python benchmarks/structured.py [--images N] [--threads N] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fastvlm import StructuredOutput, VisionLanguageModel, load
from fastvlm.decoding import Request
from fastvlm.evaluation.measuring import hardware, rotated, run_requests
from fastvlm_example import HELD_OUT_SCENES, SCENE_PROMPT
from fastvlm_example.scenes import render, sample

THING = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue", "yellow", "purple", "black", "white"]},
        "shape": {"enum": ["circle", "square", "triangle"]},
        "row": {"type": "integer", "minimum": 1, "maximum": 3},
        "column": {"type": "integer", "minimum": 1, "maximum": 3},
    },
    "required": ["colour", "shape", "row", "column"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": THING, "minItems": 3, "maxItems": 3}
FORMS = {
    "free": None,
    "any text": StructuredOutput("regex", "(?s:.*)"),
    "JSON": StructuredOutput("json", SCHEMA),
}
STRATEGIES = ("autoregressive", "prompt-lookup", "imitation")


def milliseconds(request: Request) -> float:
    """Return the time per token after the first one."""
    times = request.times
    return 1000 * (times[-1] - times[0]) / max(len(times) - 1, 1)


def answered(vlm: VisionLanguageModel, images: int, limit: int) -> dict[str, dict[str, list[Any]]]:
    """Return the requests of each form and strategy; the first image only warms up."""
    found: dict[str, dict[str, list[Any]]] = {form: defaultdict(list) for form in FORMS}
    for number in range(images + 1):
        image = render(sample(HELD_OUT_SCENES + number), vlm.image_size)
        for form, structured in FORMS.items():
            for name in rotated(STRATEGIES, number):
                request = vlm.request(
                    SCENE_PROMPT, image, strategy=name, structured=structured, max_new_tokens=limit
                )
                run_requests(vlm.engine, [request])
                if number:
                    found[form][name].append(request)
    return found


def compile_milliseconds(vlm: VisionLanguageModel) -> float:
    """Return the time that a new schema takes, once the tokenizer is known."""
    taken = []
    for size in range(10, 15):
        form = StructuredOutput("json", {**SCHEMA, "maxItems": size})
        started = time.perf_counter()
        vlm.builder.grammars.constraint(form, vlm.end_tokens)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def figures(ways: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the figures of one form."""
    plain = [one.output_token_ids for one in ways["autoregressive"]]
    return {
        "tokens": sum(map(len, plain)),
        "ended": sum(one.finish_reason == "stop" for one in ways["autoregressive"]),
        "strategies": {
            name: {
                "ms_per_token": statistics.median(map(milliseconds, ways[name])),
                "accepted_share": sum(sum(one.accepted) for one in ways[name])
                / max(sum(sum(one.proposed) for one in ways[name]), 1),
                "same_as_without_drafts": [one.output_token_ids for one in ways[name]] == plain,
            }
            for name in STRATEGIES
        },
    }


def main() -> None:
    """Decode each scene in each form with each strategy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--limit", type=int, default=250, help="The maximum of tokens in a reply.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    vlm = load()
    found = answered(vlm, options.images, options.limit)
    free, any_text = (
        [one.output_token_ids for one in found[form]["autoregressive"]]
        for form in ("free", "any text")
    )
    out: dict[str, Any] = {
        "hardware": hardware(),
        "settings": {k: v for k, v in vars(options).items() if k != "json"},
        "compile_ms": compile_milliseconds(vlm),
        "any_text_equals_free": free == any_text,
        "forms": {form: figures(ways) for form, ways in found.items()},
    }
    print(json.dumps(out, indent=1))  # noqa: T201
    if options.json is not None:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
