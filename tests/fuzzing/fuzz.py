"""Draw cases of every area, check each in a process of its own, and count what came of them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers.utils import logging

from tests.fuzzing import sandbox
from tests.fuzzing.area import Area
from tests.fuzzing.areas import AREAS
from tests.fuzzing.sandbox import Outcome

KEPT = 40
"""Faults of an area that are kept whole."""


@dataclass
class Tally:
    """What came of the cases of an area.

    Args:
        outcomes: How many of each kind.
        faults: Those that must not be, as text: the case and what was wrong.
        slowest: Seconds of the slowest case.
        largest: Bytes of the largest.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, str]] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0

    def add(self, case: Any, outcome: Outcome) -> None:
        """Count a case."""
        self.outcomes[outcome.kind] += 1
        self.slowest = max(self.slowest, outcome.seconds)
        self.largest = max(self.largest, outcome.bytes)
        if not outcome.fine and len(self.faults) < KEPT:
            self.faults.append({"case": repr(case), "kind": outcome.kind, "said": outcome.said})


def quiet() -> None:
    """Let forks be safe and what others log be silent."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    # Training turns it on, and hypothesis draws denormals.
    torch.set_flush_denormal(False)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def fuzz(area: Area, number: int, start: int = 0) -> Iterator[tuple[Any, Outcome]]:
    """Yield cases of an area and what came of each.

    Args:
        area: The area.
        number: How many cases.
        start: The seed of their draws.
    """
    found: list[tuple[Any, Outcome]] = []

    @seed(start)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(area.cases())
    def check(case: Any) -> None:
        found.append((case, sandbox.run(area.check, case)))

    check()
    yield from found


def tallied(name: str, number: int, start: int) -> Tally:
    """Return what came of so many cases of an area."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as folder:
        area = AREAS[name](Path(folder))
        done = 0
        # In parts: hypothesis keeps a record of each draw of a run.
        while done < number:
            part = min(500, number - done)
            for case, outcome in fuzz(area, part, start + done):
                tally.add(case, outcome)
            done += part
    return tally


def main(
    cases: Annotated[int, typer.Option(min=8, help="Cases of all areas together.")] = 5000,
    only: Annotated[str, typer.Option(help="Areas, separated by commas.")] = "",
    start: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--json", help="Where to write the counts.")
    ] = None,
) -> None:
    """Fuzz, and print how many cases ended how, an area a line."""
    quiet()
    names = [name.strip() for name in only.split(",") if name.strip()] or list(AREAS)
    whole = sum(AREAS[name].share for name in names)
    results, started = {}, time.monotonic()
    for name in names:
        tally = tallied(name, max(1, round(cases * AREAS[name].share / whole)), start)
        results[name] = {
            "cases": tally.outcomes.total(),
            **{kind: tally.outcomes[kind] for kind in ("right", "sentence", "fault", "hang",
                                                       "memory")},
            "slowest_seconds": round(tally.slowest, 2),
            "largest_mib": round(tally.largest / 2**20),
            "faults": tally.faults,
        }  # fmt: skip
        line = {key: value for key, value in results[name].items() if key != "faults"}
        print(f"{name}: {line}", file=sys.stderr, flush=True)  # noqa: T201
        if output is not None:
            figures = {"seconds": round(time.monotonic() - started), "areas": results}
            output.write_text(json.dumps(figures, indent=1) + "\n")
    if any(row["cases"] != row["right"] + row["sentence"] for row in results.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
