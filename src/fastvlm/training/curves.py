"""Plots of a run's log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastvlm.functional.errors import InputError
from fastvlm.functional.files import written_file
from fastvlm.functional.text_files import parse_json

PLOT_COLUMNS = 3


def read_log(log: Path) -> list[dict[str, Any]]:
    """Return a log's entries, without lines that are incomplete or broken."""
    if not log.is_file():
        return []
    entries = []
    for line in log.read_bytes().split(b"\n"):
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def read_curves(log: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return a log's curves, grouped by the last word of their names."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in read_log(log):
        step = entry["step"]
        for name, value in entry.items():
            if name == "step":
                continue
            curves.setdefault(name.split()[-1], {}).setdefault(name, []).append((step, value))
    return curves


def draw_curves(log: Path, image: Path) -> None:
    """Plot a log's curves over the steps, those of the same quantity together.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "The curves are not drawn without matplotlib: pip install 'fastvlm[plots]'."
        ) from error
    curves = read_curves(log)
    rows = math.ceil(len(curves) / PLOT_COLUMNS)
    figure = Figure(figsize=(4.2 * PLOT_COLUMNS, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (measure, named) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, PLOT_COLUMNS, number + 1)
        for name, points in named.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker=".", label=name)
        axes.set(xlabel="step", title=measure)
        axes.grid(alpha=0.3)
        if set(named) != {measure}:
            axes.legend(frameon=False, fontsize=8)
    with written_file(image) as beside:
        figure.savefig(beside, format="png", dpi=110)
