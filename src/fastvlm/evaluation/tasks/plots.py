"""Charts drawn as SVG by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

from fastvlm.evaluation.tasks.curves import Chart
from fastvlm.functional.errors import InputError

FIGURE_SIZE_INCHES = (7.0, 4.2)
MARKER_STYLES = "osD^vPXd<>"


def pyplot() -> Any:
    """Return matplotlib's drawing functions, for files only.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise InputError(
            "The report's plots need matplotlib: pip install 'fastvlm[plots]'."
        ) from error
    mpl.use("agg")
    from matplotlib import pyplot as plt

    return plt


def drawn(chart: Chart, strategies: Sequence[str]) -> str:
    """Return a chart as SVG, the same for the same data.

    Args:
        chart: The chart.
        strategies: All strategies; each has the same colour and marker in every chart.

    Raises:
        InputError: matplotlib is not installed.
    """
    plt = pyplot()
    settings = {"svg.hashsalt": chart.name, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=FIGURE_SIZE_INCHES, layout="constrained")
        named = all(curve.label in strategies for curve in chart.curves)
        for number, curve in enumerate(chart.curves):
            place = strategies.index(curve.label) if named else number
            colour = plt.get_cmap("tab10")(place % 10)
            errors = None
            if curve.low is not None and curve.high is not None:
                errors = [
                    [y - low for y, low in zip(curve.y, curve.low, strict=True)],
                    [high - y for y, high in zip(curve.y, curve.high, strict=True)],
                ]
            # Error bars at one place would hide one another.
            shift = 1 + 0.02 * (number - (len(chart.curves) - 1) / 2) if chart.doubling else 1
            axes.errorbar(
                [x * shift for x in curve.x], curve.y, yerr=errors, label=curve.label, color=colour,
                marker=MARKER_STYLES[place % len(MARKER_STYLES)], markersize=5, capsize=2,
                linewidth=1.4, elinewidth=0.8,
            )  # fmt: skip
            for x, y, note in zip(curve.x, curve.y, curve.notes or (), strict=False):
                axes.annotate(
                    note, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8,
                    color="dimgrey",
                )  # fmt: skip
        if not chart.doubling and all(x == int(x) for curve in chart.curves for x in curve.x):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=chart.x, ylabel=chart.y)
        axes.grid(alpha=0.25)
        if chart.doubling:
            marks = sorted({x for curve in chart.curves for x in curve.x})
            axes.set_xscale("log", base=2)
            axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
        if chart.y.startswith("speedup"):
            axes.axhline(1, color="dimgrey", linewidth=0.8, linestyle="--")
        if "share" in chart.y:
            axes.set_ylim(0, 1.03)
        if any(curve.notes is None for curve in chart.curves):
            figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()
