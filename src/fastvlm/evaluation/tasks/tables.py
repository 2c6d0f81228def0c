"""The tables of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastvlm.evaluation.tasks.document import Paragraph, Part, Table
from fastvlm.evaluation.tasks.plan import Plan
from fastvlm.evaluation.tasks.scores import ScoreRow, Speed, headline
from fastvlm.functional.statistics import Spread


def reference(plan: Plan) -> str:
    """Return the name of the strategy that others are compared with."""
    return next(iter(plan.strategies))


def lossless(plan: Plan, rows: Sequence[ScoreRow]) -> str:
    """Return a sentence that says whether all strategies gave the same replies."""
    compared = [row for row in rows if row.speed is not None and row.strategy != reference(plan)]
    replies = sum(row.speed.replies for row in compared if row.speed is not None)
    different = sum(row.different for row in compared)
    if not compared:
        return "Options are rated by the model; no strategy has a part in that."
    if not different:
        return f"All {replies} replies have the same tokens as those of {reference(plan)}."
    return (
        f"{different} of {replies} replies have other tokens than those of {reference(plan)}; the"
        " tables of the tasks say which strategy's. A tie of two tokens within the rounding can"
        " fall either way; fastvlm audit tells ties from errors."
    )


SPEED_TABLE_COLUMNS: Sequence[Sequence[tuple[str, Callable[[ScoreRow, Speed], str]]]] = (
    (
        ("tokens", lambda _, speed: spread(speed.tokens, 0)),
        ("TTFT ms", lambda _, speed: spread(speed.ttft_ms, 0)),
        ("TPOT ms", lambda _, speed: spread(speed.tpot_ms, 2)),
        ("tokens/s decoding", lambda _, speed: spread(speed.decode_rate, 0)),
        ("tokens/s end to end", lambda _, speed: spread(speed.whole_rate, 0)),
    ),
    (
        ("other replies", lambda row, _: str(row.different)),
        ("calls of the full model", lambda _, speed: spread(speed.passes, 0)),
        ("acceptance rate", lambda _, speed: spread(speed.acceptance_rate, 2)),
        ("acceptance length", lambda _, speed: spread(speed.acceptance_length, 2)),
        ("draft length", lambda _, speed: spread(speed.draft_length, 1)),
    ),
)
"""The columns of two tables: timings, and acceptance of drafts."""


def overview(plan: Plan, rows: Sequence[ScoreRow], value: Callable[[ScoreRow], str]) -> Table:
    """Return a table with a row for each strategy and a column for each task and image size.

    Args:
        plan: The evaluation's plan.
        rows: The scores.
        value: Returns a cell's text.
    """
    found = {(row.strategy, row.task, row.size): value(row) for row in rows}
    columns = list(dict.fromkeys((row.task, row.size) for row in rows))
    heading = [
        label(plan.tasks[task].name, size) + (f": {headline(task)}" if value is quality else "")
        for task, size in columns
    ]
    cells = {
        strategy: [found.get((strategy, *column), "-") for column in columns]
        for strategy in plan.strategies
    }
    body = [[name, *row] for name, row in cells.items() if set(row) != {"-"}]
    return Table(["strategy", *heading], body)


def label(name: str, size: int | None) -> str:
    """Return a name with the size of its images."""
    return name if size is None else f"{name}, {size} px"


def quality(row: ScoreRow) -> str:
    """Return a task's main score."""
    return "not judged" if row.scores is None else score(row.scores[headline(row.task)])


def speedup(row: ScoreRow) -> str:
    """Return the speedup per token."""
    return "-" if row.speed is None else times(row.speed.speedup)


def speedup_end_to_end(row: ScoreRow) -> str:
    """Return the speedup of whole replies."""
    return "-" if row.speed is None else times(row.speed.speedup_end_to_end)


def acceptance(row: ScoreRow) -> str:
    """Return acceptance rate and acceptance length."""
    if row.speed is None or row.speed.acceptance_rate is None:
        return "-"
    length = row.speed.acceptance_length
    tokens = None if length is None else length.median
    return f"{row.speed.acceptance_rate.median:.0%}, {number(tokens, 2)}"


def task_parts(plan: Plan, rows: Sequence[ScoreRow]) -> list[Part]:
    """Return a task's scores and speed in full."""
    found: list[Part] = []
    scored = [row for row in rows if row.scores is not None]
    if len(scored) < len(rows):
        found.append(
            Paragraph(
                "Not judged: name a judge (--judge) or a file of grades (--grades). The replies lie"
                " in submissions/, as the publisher's own evaluator takes them."
            )
        )
    if scored:
        found.append(score_table(plan, scored))
    written = [(row, row.speed) for row in rows if row.speed is not None]
    if written:
        found.append(Paragraph("Medians and quartiles over the replies:"))
        for columns in SPEED_TABLE_COLUMNS:
            body = [
                [label(row.strategy, row.size), *(cells(row, speed) for _, cells in columns)]
                for row, speed in written
            ]
            found.append(Table(["strategy", *(name for name, _ in columns)], body))
        found += length_table(plan, [row for row, _ in written])
    return found


def score_table(plan: Plan, rows: Sequence[ScoreRow]) -> Table:
    """Return all scores of a task; strategies whose scores are equal share a column."""
    groups: dict[tuple[int | None, tuple[tuple[str, float], ...]], list[str]] = {}
    for row in rows:
        groups.setdefault((row.size, tuple((row.scores or {}).items())), []).append(row.strategy)
    heading = [
        label("all strategies" if len(names) == len(plan.strategies) else ", ".join(names), size)
        for (size, _), names in groups.items()
    ]
    columns = [dict(scores) for _, scores in groups]
    body = [[name, *(score(column[name]) for column in columns)] for name in columns[0]]
    return Table(["score", *heading], body)


def length_table(plan: Plan, rows: Sequence[ScoreRow]) -> list[Part]:
    """Return the speedups by the length of the reply, where there are several lengths."""
    lengths = sorted({length for row in rows for length in row.by_length})
    compared = [row for row in rows if row.strategy != reference(plan)]
    if len(lengths) < 2 or not compared:  # noqa: PLR2004 (two make a comparison)
        return []
    most = {
        length: max(row.by_length[length].replies for row in rows if length in row.by_length)
        for length in lengths
    }
    heading = ["strategy", *(f"to {length} tokens ({most[length]})" for length in lengths)]

    def cells(row: ScoreRow, value: Callable[[Speed], Spread | None]) -> list[str]:
        return [
            times(value(row.by_length[length])) if length in row.by_length else "-"
            for length in lengths
        ]

    return [
        Paragraph("Speedup by the reply's length (replies), per token after the first:"),
        Table(
            heading,
            [[label(r.strategy, r.size), *cells(r, lambda s: s.speedup)] for r in compared],
        ),
        Paragraph("The same of whole replies:"),
        Table(
            heading,
            [
                [label(r.strategy, r.size), *cells(r, lambda s: s.speedup_end_to_end)]
                for r in compared
            ],
        ),
    ]


def number(value: float | None, digits: int) -> str:
    """Return a number with some digits after the decimal point; a dash for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def score(value: float) -> str:
    """Return a score, to a hundredth of a point."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"  # noqa: PLR2004 (a point or 100)


def spread(value: Spread | None, digits: int) -> str:
    """Return a median with its quartiles."""
    if value is None:
        return "-"
    low, high = number(value.low, digits), number(value.high, digits)
    return f"{number(value.median, digits)} ({low}-{high})"


def times(value: Spread | None) -> str:
    """Return a speedup with its quartiles."""
    if value is None:
        return "-"
    return f"{value.median:.2f}x ({value.low:.2f}-{value.high:.2f})"
