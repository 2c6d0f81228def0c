"""Write the README's table of figures from the committed results, so that none is ever typed.

Run `python benchmarks/readme.py` after new results are committed; a test holds the two together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
RUNS = {"scenes": "rendered scenes", "photographs": "photographs"}


def table() -> str:
    """Return the figures as Markdown."""
    runs = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in RUNS
    }
    rows = {name: {row["strategy"]: row for row in run["results"]} for name, run in runs.items()}
    titles = " | ".join(f"{title}: ms a token | speedup | tokens a pass" for title in RUNS.values())
    lines = [f"| strategy | {titles} |", f"|---|{'---:|' * 3 * len(RUNS)}"]
    for strategy in rows["scenes"]:
        cells = " | ".join(cell for name in RUNS for cell in _cells(rows[name][strategy]))
        lines.append(f"| {strategy} | {cells} |")
    hardware = runs["scenes"]["hardware"]
    replies = " and ".join(
        f"{found['autoregressive']['replies']} descriptions of {RUNS[name]} of"
        f" {found['autoregressive']['tokens']:.0f} tokens"
        for name, found in rows.items()
    )
    lines += [
        "",
        (
            f"Medians (quartiles) over {replies}; batch of one, greedy, float32,"
            f" {hardware['threads']} threads of {hardware['processor']}. Speedup is against our own"
            " autoregressive decoding in the same run, and every reply has the same tokens as"
            " `transformers`' own `generate`."
        ),
    ]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    low, high = row["speedup_iqr"]
    return (
        f"{row['tpot_ms']:.2f}",
        f"{row['speedup']:.2f}x ({low:.2f}-{high:.2f})",
        f"{row['acceptance_length'] or 1:.2f}",
    )


def rewritten(readme: str) -> str:
    """Return the README with its figures renewed."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(rewritten(file.read_text()))
