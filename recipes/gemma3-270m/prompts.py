"""Prompts of six kinds, from which a draft for a pretrained text model learns.

A base model continues what it is given, so each prompt is the beginning of a text: a story, a
question, a list, code, a text in another language, a dialogue. They are made of the openings and
subjects in `prompts/openings.json`; those of `prompts/held-out.jsonl`, on which the draft is
measured, are others.

Run `python recipes/gemma3-270m/prompts.py OUTPUT.jsonl [--each N] [--seed N]`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlm.functional.files import write_text

OPENINGS = Path(__file__).parent / "prompts" / "openings.json"


def prompts_of(kind: str, parts: dict[str, Any]) -> Iterator[str]:
    """Yield every prompt of a kind that the openings and their subjects make."""
    for opening, subjects in parts["kinds"][kind]:
        for chosen in itertools.product(*(parts[name] for name in subjects)):
            yield opening.format(*chosen)


def drawn(each: int, seed: int) -> list[dict[str, str]]:
    """Return at most `each` prompts of every kind, in an order of their own."""
    parts: dict[str, Any] = json.loads(OPENINGS.read_text(encoding="utf-8"))
    chance, found = random.Random(seed), []
    for kind in parts["kinds"]:
        every = sorted(set(prompts_of(kind, parts)))
        chosen = chance.sample(every, min(each, len(every)))
        found += [{"kind": kind, "prompt": prompt} for prompt in chosen]
    chance.shuffle(found)
    return found


def main() -> None:
    """Write training prompts as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--each", type=int, default=400, help="the most prompts of a kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = drawn(options.each, options.seed)
    write_text(options.output, "".join(f"{json.dumps(row)}\n" for row in rows))
    sys.stdout.write(f"{len(rows):,} prompts in {options.output}.\n")


if __name__ == "__main__":
    main()
