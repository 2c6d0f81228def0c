"""Write the README's table of figures from the committed results, so that none is ever typed.

Run `python benchmarks/readme.py` after new results are committed; a test holds the two together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = {"scenes": "rendered scenes", "photographs": "photographs"}


def read(name: str) -> Any:
    """Return a committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def decoding() -> str:
    """Return the figures of decoding as Markdown."""
    runs = {
        name: read(name) for name in RUNS
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


def first_token() -> str:
    """Return the times to first token as Markdown."""
    run, encoders = read("ttft"), read("encoder")
    records = {(record["name"], record["side"]): record for record in run["results"]}
    slowest = records["LLaVA-OneVision-0.5B", 1152]["ttft_ms"][0]
    lines = [
        "| model | px | visual tokens | encoder ms | prefill ms | TTFT ms"
        " | sooner than LLaVA-OneVision |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, side), record in records.items():
        if name.startswith("FastVLM-1.5B") or name.startswith("ConvNeXt"):
            continue
        ms = {stage: f"{times[0]:,.0f}" for stage, times in record["ms"].items()}
        median = record["ttft_ms"][0]
        lines.append(
            f"| {name} | {side} | {record['visual_tokens']:,} | {ms['vision']} | {ms['prefill']}"
            f" | {median:,.0f} | {slowest / median:.1f}x |"
        )
    machine = run["hardware"]
    ratios = ", ".join(
        f"{found['ratio'][0]:.2f}x at {found['size']} px" for found in encoders["results"]
    )
    lines += [
        "",
        (
            f"Medians of {run['results'][0]['rounds']} rounds, the models in turns, at full size"
            f" with random weights, {run['dtype']}, {machine['threads']} threads of"
            f" {machine['processor']}; FastVLM through our engine, the others through"
            " `transformers`. FastViTHD alone encodes sooner than timm's fused one as"
            f" `transformers` runs it: {ratios}. All of them, and the arithmetic:"
            " [benchmarks/results/ttft.md](benchmarks/results/ttft.md)."
        ),
    ]
    return "\n".join(lines)


SECTIONS = {"figures": decoding, "ttft": first_token}


def rewritten(readme: str) -> str:
    """Return the README with its figures renewed."""
    for name, text in SECTIONS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = readme.split(begin)
        _, after = rest.split(end)
        readme = f"{before}{begin}\n{text()}\n{end}{after}"
    return readme


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(rewritten(file.read_text()))
