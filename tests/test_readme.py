"""The README's figures are those of the committed results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("scenes", "photographs")]


def test_the_readmes_figures_are_the_committed_ones() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text()
    assert module.rewritten(text) == text


def test_every_committed_reply_was_identical() -> None:
    for file in RUNS:
        for row in json.loads(file.read_text())["results"]:
            assert row["identical"], f"{file.name}: {row['strategy']}"
