"""The curves of a run, drawn from its log."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fastvlm.functional.errors import InputError

COLUMNS = 3


def read_curves(log: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return a log's curves by what they measure: a measure's name ends with that word."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in log.read_text().splitlines():
        measures = json.loads(line)
        step = measures.pop("step")
        for name, value in measures.items():
            curves.setdefault(name.split()[-1], {}).setdefault(name, []).append((step, value))
    return curves


def draw_curves(log: Path, picture: Path) -> None:
    """Draw a log's curves over the steps, those of one measure together.

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
    rows = math.ceil(len(curves) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (measure, named) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, COLUMNS, number + 1)
        for name, points in named.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker=".", label=name)
        axes.set(xlabel="step", title=measure)
        axes.grid(alpha=0.3)
        if set(named) != {measure}:
            axes.legend(frameon=False, fontsize=8)
    beside = picture.with_suffix(".partial")
    figure.savefig(beside, format="png", dpi=110)
    beside.replace(picture)
