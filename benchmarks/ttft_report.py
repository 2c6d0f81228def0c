"""The table and the plot of a run of `benchmarks/ttft.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlm.functional.errors import InputError
from ttft_stages import STAGES

Record = Mapping[str, Any]

PUBLISHED = {("FastVLM-0.5B", 1024): 166, ("LLaVA-OneVision-0.5B", 1152): 14124}
"""TTFT in milliseconds as arXiv 2412.13303 gives it: on Apple's hardware and Neural Engine."""
REFERENCE = ("LLaVA-OneVision-0.5B", 1152)


def rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return a table's heading and its rows, as text."""
    slowest = next((r["ttft_ms"][0] for r in records if (r["name"], r["side"]) == REFERENCE), None)
    heading = [
        "model", "run by", "px", "visual tokens", "encoder M", "GFLOP",
        *(f"{stage.replace('_', ' ')} ms" for stage in STAGES),
        "TTFT ms", "quartiles", "sooner than LLaVA-OneVision", "published TTFT ms",
    ]  # fmt: skip
    body = []
    for record in records:
        median, low, high = record["ttft_ms"]
        published = PUBLISHED.get((record["name"], record["side"]))
        body.append(
            [
                record["name"],
                record["software"],
                str(record["side"]),
                str(record["visual_tokens"]),
                f"{record['parameters']['vision'] / 1e6:.0f}",
                f"{sum(record['gflop'].values()):,.0f}",
                *(f"{record['ms'][stage][0]:,.0f}" for stage in STAGES),
                f"{median:,.0f}",
                f"{low:,.0f}-{high:,.0f}",
                "-" if slowest is None else f"{slowest / median:.1f}x",
                "-" if published is None else f"{published:,}",
            ]
        )
    return heading, body


def markdown(records: Sequence[Record], machine: str) -> str:
    """Return the table as Markdown, with what it was measured on."""
    heading, body = rows(records)
    text = (
        f"Medians of {records[0]['rounds']} rounds, the models in turns, on {machine}. The models"
        " have their full size and random weights, which time does not depend on. GFLOP are"
        " counted, a multiplication and an addition as two. Vision is the encoder, projector what"
        " lies between it and the decoder, prefill all decoder layers over the prompt, first token"
        " the norm, the head and the choice. The published figures were measured on Apple's"
        " hardware (arXiv 2412.13303)."
    )
    lines = [
        "# Time to first token",
        "",
        text,
        "",
        f"| {' | '.join(heading)} |",
        f"|{'|'.join(['---', '---', *['---:'] * (len(heading) - 2)])}|",
        *(f"| {' | '.join(row)} |" for row in body),
        "",
    ]
    return "\n".join(lines)


def plot(records: Sequence[Record], file: Path) -> None:
    """Draw TTFT against visual tokens, both logarithmic, a line for each model.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise InputError("The plot needs matplotlib: pip install 'fastvlm[plots]'.") from error
    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for series in dict.fromkeys((r["name"], r["software"]) for r in records):
        found = [r for r in records if (r["name"], r["software"]) == series]
        found.sort(key=lambda record: record["visual_tokens"])
        tokens = [r["visual_tokens"] for r in found]
        medians = [r["ttft_ms"][0] / 1e3 for r in found]
        errors = [
            [(r["ttft_ms"][0] - r["ttft_ms"][1]) / 1e3 for r in found],
            [(r["ttft_ms"][2] - r["ttft_ms"][0]) / 1e3 for r in found],
        ]
        name, software = series
        label = name if software == "fastvlm" else f"{name} (transformers)"
        axes.errorbar(tokens, medians, yerr=errors, marker="o", capsize=3, label=label)
        for record, x, y in zip(found, tokens, medians, strict=True):
            axes.annotate(
                f"{record['side']} px", (x, y), xytext=(5, -10), textcoords="offset points",
                fontsize=7, color="dimgrey",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="visual tokens", ylabel="time to first token, s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)
