"""The figures of README and docs are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import figures

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ("scenes", "photos", "large-scenes", "large-photos")


@pytest.mark.parametrize("document", figures.DOCUMENTS)
def test_the_figures_are_the_committed_ones(document: str) -> None:
    assert figures.rewritten(document) == (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("run", RUNS)
def test_every_benchmarked_reply_was_identical(run: str) -> None:
    for row in json.loads((RESULTS / f"{run}.json").read_text())["results"]:
        assert row["identical"], row["strategy"]


def test_every_evaluated_strategy_has_the_same_quality() -> None:
    for report in RESULTS.glob("20*/report.json"):
        rows = json.loads(report.read_text())["results"]
        assert not any(row["different"] for row in rows)
        for task in {row["task"] for row in rows}:
            scores = [row["scores"] for row in rows if row["task"] == task]
            assert all(own == scores[0] for own in scores)
