"""The report of an evaluation: tables, plots and examples, as JSON, Markdown and HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from fastvlm.data.tasks import Item
from fastvlm.evaluation.tasks.answers import Journal
from fastvlm.evaluation.tasks.curves import charts
from fastvlm.evaluation.tasks.document import (
    ExampleBox,
    Heading,
    Paragraph,
    Part,
    Plot,
    Table,
    html,
    markdown,
)
from fastvlm.evaluation.tasks.plan import Plan
from fastvlm.evaluation.tasks.plots import drawn
from fastvlm.evaluation.tasks.scores import ScoreRow
from fastvlm.evaluation.tasks.tables import (
    acceptance,
    lossless,
    number,
    overview,
    quality,
    reference,
    speedup,
    speedup_end_to_end,
    task_parts,
)
from fastvlm.functional.files import write_text
from fastvlm.vision.loading import load_image

EXAMPLES_PER_TASK = 2
"""The number of items of each task that are shown."""
MAX_IMAGE_SIDE_PIXELS = 440
"""The maximum side of an image in the report, in pixels."""
REPORT_TITLE = "Quality and speed on the same images"


def write_report(folder: Path, plan: Plan, journal: Journal, rows: Sequence[ScoreRow]) -> None:
    """Write `report.json`, `report.md`, `report.html` and `figures/`.

    Args:
        folder: The folder to write to.
        plan: The evaluation's plan.
        journal: The answers.
        rows: The scores.

    Raises:
        InputError: matplotlib is not installed.
    """
    plots = [
        Plot(chart.name, chart.title, drawn(chart, list(plan.strategies)), chart.caption)
        for chart in charts(plan, journal, rows)
    ]
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for plot in plots:
        write_text(figures / f"{plot.name}.svg", plot.svg)
    content = {
        "plan": plan.to_json(),
        "sessions": journal.sessions,
        "failed": [asdict(failure) for failure in journal.failures.values()],
        "results": [row.to_json() for row in rows],
    }
    write_text(folder / "report.json", json.dumps(content, indent=2) + "\n")
    found = parts(plan, journal, rows, plots)
    write_text(folder / "report.md", markdown(REPORT_TITLE, found))
    write_text(folder / "report.html", html(REPORT_TITLE, found))


def parts(
    plan: Plan, journal: Journal, rows: Sequence[ScoreRow], plots: Sequence[Plot]
) -> list[Part]:
    """Return the contents of the report.

    Args:
        plan: The evaluation's plan.
        journal: The answers.
        rows: The scores.
        plots: The plots.
    """
    written = [row for row in rows if row.speed is not None]
    found: list[Part] = [*provenance(plan, journal)]
    found += failures(journal)
    found += [Heading("Quality"), Paragraph(lossless(plan, rows)), overview(plan, rows, quality)]
    if written:
        found += [
            Heading("Speedup"),
            Paragraph(
                f"Time per output token after the first, against {reference(plan)}: medians over"
                " the replies, and quartiles."
            ),
            overview(plan, written, speedup),
            Paragraph("Whole replies, image and prefill included:"),
            overview(plan, written, speedup_end_to_end),
            Heading("Acceptance"),
            Paragraph(
                "Accepted share of drafted tokens, and tokens per call of the full model: medians"
                " over the replies."
            ),
            overview(plan, written, acceptance),
        ]
    if plots:
        found.append(Heading("Plots"))
        for plot in plots:
            found += [Heading(plot.title, 3), plot]
    for name, task in plan.tasks.items():
        found += [Heading(f"{task.name} ({len(task.items)} items)")]
        found += task_parts(plan, [row for row in rows if row.task == name])
        found += [example(plan, journal, name, item) for item in task.items[:EXAMPLES_PER_TASK]]
    return found


def failures(journal: Journal) -> list[Part]:
    """Return the items that are left out, each with the reason; nothing where there are none."""
    left = list(journal.failures.values())
    if not left:
        return []
    items = len({(failure.task, failure.item) for failure in left})
    said = f"{items} {'item' if items == 1 else 'items'} could not be asked; no figure counts"
    rows = [[failure.task, failure.item, failure.reason] for failure in left]
    return [
        Heading("Left out"),
        Paragraph(f"{said} {'it' if items == 1 else 'them'}."),
        Table(["benchmark", "item", "reason"], rows),
    ]


def provenance(plan: Plan, journal: Journal) -> list[Part]:
    """Return what was measured, when and on what."""
    found: list[Part] = []
    for session in journal.sessions:
        machine = session["hardware"]
        runtime = machine.get("onnxruntime")
        onnx = "" if runtime is None else f", ONNX Runtime {runtime}"
        found.append(
            Paragraph(
                f"Measured from {session['date']} on"
                f" {machine['accelerator'] or machine['processor']}"
                f" ({machine['cores']} cores, threads: {machine['threads']}), with fastvlm"
                f" {session['fastvlm']} (commit {session['commit'] or 'unknown'}), torch"
                f" {machine['torch']}, transformers {machine['transformers']}{onnx}, Python"
                f" {machine['python']}."
            )
        )
    found.append(
        Paragraph(
            f"Model: {plan.model}, {plan.dtype}, greedy, one reply at a time of at most"
            f" {plan.max_new_tokens} tokens. Every strategy answers a question before the next one"
            " is asked, in turns of being first, and pays for its image."
        )
    )
    rows = [
        [
            name,
            number(what["exit_layer"], 0),
            drafts(what),
            "-" if what["network"] is None else what["network"]["kind"],
            "-" if not what["skipped_layers"] else ", ".join(map(str, what["skipped_layers"])),
        ]
        for name, what in plan.strategies.items()
    ]
    heading = ["strategy", "exit layer", "draft length", "network", "skipped layers"]
    return [*found, Table(heading, rows)]


def drafts(what: Mapping[str, Any]) -> str:
    """Return a strategy's draft length as the report shows it."""
    if what["kind"] == "autoregressive":
        return "-"
    return "its own rule" if what["draft_length"] is None else str(what["draft_length"])


def example(plan: Plan, journal: Journal, task: str, item: Item) -> ExampleBox:
    """Return an item with its image and all replies to it.

    Args:
        plan: The evaluation's plan.
        journal: The answers.
        task: The task's name.
        item: The item.
    """
    size = plan.sizes[0]
    if item.options:
        ratings = journal.ratings[task, item.id, size].ratings
        best = max(range(len(ratings)), key=lambda option: ratings[option])
        replies = [("rated highest", item.options[best])]
    else:
        by_text: dict[str, list[str]] = {}
        for name in plan.strategies:
            by_text.setdefault(journal.answers[task, item.id, size, name].text, []).append(name)
        everybody = len(by_text) == 1
        replies = [
            ("all strategies" if everybody else ", ".join(names), text)
            for text, names in by_text.items()
        ]
    image = load_image(item.open())
    image.thumbnail((MAX_IMAGE_SIDE_PIXELS, MAX_IMAGE_SIDE_PIXELS))
    out = BytesIO()
    image.save(out, "JPEG", quality=80)
    return ExampleBox(out.getvalue(), item.prompt, replies)
