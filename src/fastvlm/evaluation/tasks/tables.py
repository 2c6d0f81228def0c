"""The tables of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastvlm.evaluation.tasks.document import Paragraph, Part, Table
from fastvlm.evaluation.tasks.plan import Plan
from fastvlm.evaluation.tasks.scores import Row, Speed, headline
from fastvlm.functional.statistics import Spread


def reference(plan: Plan) -> str:
    """Return the name of the strategy that others are compared with."""
    return next(iter(plan.strategies))


def lossless(plan: Plan, rows: Sequence[Row]) -> str:
    """Return in a sentence whether all strategies replied the same."""
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


def overview(plan: Plan, rows: Sequence[Row], value: Callable[[Row], str]) -> Table:
    """Return a table of strategies and tasks."""
    tasks = [name for name in plan.tasks if any(row.task == name for row in rows)]
    found = {(row.strategy, row.size, row.task): value(row) for row in rows}
    body = []
    for strategy in plan.strategies:
        for size in plan.sizes:
            cells = [found.get((strategy, size, task), "-") for task in tasks]
            if any(cell != "-" for cell in cells):
                body.append([label(strategy, size), *cells])
    names = [plan.tasks[task].name for task in tasks]
    if value is quality:
        names = [f"{name}: {headline(task)}" for name, task in zip(names, tasks, strict=True)]
    return Table(["strategy", *names], body)


def label(strategy: str, size: int | None) -> str:
    """Return a strategy with the size of its pictures."""
    return strategy if size is None else f"{strategy}, {size} px"


def quality(row: Row) -> str:
    """Return a task's main score."""
    return "not judged" if row.scores is None else score(row.scores[headline(row.task)])


def speedup(row: Row) -> str:
    """Return the speedup per token."""
    return "-" if row.speed is None else times(row.speed.speedup)


def speedup_end_to_end(row: Row) -> str:
    """Return the speedup of whole replies."""
    return "-" if row.speed is None else times(row.speed.speedup_end_to_end)


def acceptance(row: Row) -> str:
    """Return rate and length of what was accepted."""
    if row.speed is None or row.speed.acceptance_rate is None:
        return "-"
    length = row.speed.acceptance_length
    tokens = None if length is None else length.median
    return f"{row.speed.acceptance_rate.median:.0%}, {number(tokens, 2)}"


def task_parts(plan: Plan, rows: Sequence[Row]) -> list[Part]:
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
        names = list(scored[0].scores or {})
        found.append(
            Table(
                ["strategy", *names],
                [
                    [label(row.strategy, row.size), *(score((row.scores or {})[n]) for n in names)]
                    for row in scored
                ],
            )
        )
    written = [(row, row.speed) for row in rows if row.speed is not None]
    if written:
        heading = [
            "strategy", "other replies", "tokens", "TTFT ms", "TPOT ms", "tokens/s decoding",
            "tokens/s in all", "full model's calls", "accepted", "tokens a call", "draft length",
        ]  # fmt: skip
        body = [
            [label(row.strategy, row.size), str(row.different), *speed_cells(speed)]
            for row, speed in written
        ]
        found += [Paragraph("Medians and quartiles over the replies:"), Table(heading, body)]
        found += length_table(plan, [row for row, _ in written])
    return found


def speed_cells(speed: Speed) -> list[str]:
    """Return how replies came, a cell each."""
    return [
        spread(speed.tokens, 0),
        spread(speed.ttft_ms, 0),
        spread(speed.tpot_ms, 2),
        spread(speed.decode_rate, 0),
        spread(speed.whole_rate, 0),
        spread(speed.passes, 0),
        spread(speed.acceptance_rate, 2),
        spread(speed.acceptance_length, 2),
        spread(speed.draft_length, 1),
    ]


def length_table(plan: Plan, rows: Sequence[Row]) -> list[Part]:
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

    def cells(row: Row, value: Callable[[Speed], Spread | None]) -> list[str]:
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
    """Return a figure; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def score(value: float) -> str:
    """Return a score, of which a hundredth of a point counts."""
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
