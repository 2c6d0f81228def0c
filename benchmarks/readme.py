"""Write the README's table of figures from the committed results, so that none is ever typed.

Run `python benchmarks/readme.py` after new results are committed; a test holds the two together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
RUNS = (("scenes", "exact descriptions of scenes"), ("photographs", "descriptions of photographs"))


def table() -> str:
    """Return the figures as Markdown."""
    lines = [
        "| strategy | replies | speedup | against `transformers` | tokens a pass | TPOT, ms |",
        "|---|---|---|---|---|---|",
    ]
    hardware: dict[str, Any] = {}
    for name, title in RUNS:
        run = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        hardware = run["hardware"]
        lines += [
            f"| {row['strategy']} | {row['replies']} {title} | {row['speedup']:.2f}x |"
            f" {row['speedup_vs_transformers']:.2f}x |"
            f" {row['acceptance_length'] or 1:.2f} | {row['tpot_ms']:.2f} |"
            for row in run["results"]
        ]
    same = "every reply has the same tokens as `transformers`' own `generate`"
    lines.append("")
    lines.append(
        f"Medians; batch of one, greedy, float32, {hardware['threads']} threads of"
        f" {hardware['processor']}; {same}."
    )
    return "\n".join(lines)


def rewritten(readme: str) -> str:
    """Return the README with its figures renewed."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(rewritten(file.read_text()))
