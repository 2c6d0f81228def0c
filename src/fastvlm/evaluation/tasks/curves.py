"""The data of an evaluation's plots, as curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvlm.evaluation.measuring import speedup
from fastvlm.evaluation.tasks.answers import Answer, Journal
from fastvlm.evaluation.tasks.plan import Plan
from fastvlm.evaluation.tasks.scores import ScoreRow, headline, length_class
from fastvlm.functional.statistics import Spread

MAX_CURVE_POINTS = 12
"""The maximum number of points of a curve over the context length."""
MIN_DRAFTED_TOKENS = 10
"""The minimum number of drafted tokens that an acceptance rate is computed from."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve of a plot.

    Args:
        label: The label in the legend.
        x: The points' x coordinates.
        y: The points' y coordinates.
        low: The lower end of each point's error bar; None for a curve without them.
        high: The upper end of each point's error bar.
        notes: A text beside each point; None for none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    notes: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot.

    Args:
        name: The file's name without its suffix.
        title: The title.
        x: The label of the x axis.
        y: The label of the y axis.
        curves: The curves, at least one.
        caption: The caption.
        doubling: Whether the x axis is logarithmic with base 2.
    """

    name: str
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    caption: str
    doubling: bool = False


def charts(plan: Plan, journal: Journal, rows: Sequence[ScoreRow]) -> list[Chart]:
    """Return the plots that an evaluation has data for.

    Args:
        plan: The evaluation's plan.
        journal: The answers.
        rows: The scores.
    """
    answers = list(journal.answers.values())
    found = [
        Chart(
            "acceptance_by_context",
            "Acceptance against context length",
            "tokens of prompt, image and reply before the cycle",
            "accepted share of drafted tokens",
            by_strategy(plan, answers, acceptance_by_context),
            f"All tasks together. A point needs drafts of at least {MIN_DRAFTED_TOKENS} tokens in"
            " all.",
        ),
        Chart(
            "acceptance_by_position",
            "Acceptance by position in the draft",
            "position in the draft, from 1 on",
            "accepted share of tokens drafted there",
            by_strategy(plan, answers, acceptance_by_position),
            "A token counts as accepted if it and all before it in its draft were, so a draft that"
            " fails early fails at every later position too.",
        ),
        Chart(
            "speedup_by_length",
            "Speedup against reply length",
            "tokens of the reply, up to",
            "speedup of whole replies, image included",
            by_strategy(plan, answers, speedup_by_length(plan, answers)),
            "Medians and quartiles, all tasks together. The first token costs every strategy the"
            " same, so that a short answer can gain little.",
            doubling=True,
        ),
        *settings_charts(plan, answers),
        *quality_charts(plan, rows),
    ]
    return [chart for chart in found if chart.curves]


def by_strategy(
    plan: Plan, answers: Iterable[Answer], curve: Callable[[str, list[Answer]], Curve | None]
) -> list[Curve]:
    """Return the curves of all strategies that have one.

    Args:
        plan: The evaluation's plan.
        answers: All strategies' answers.
        curve: Makes a curve of a strategy's name and answers; None where there is no data for it.
    """
    own: dict[str, list[Answer]] = {name: [] for name in plan.strategies}
    for answer in answers:
        own[answer.strategy].append(answer)
    made = [curve(name, its) for name, its in own.items()]
    return [one for one in made if one is not None]


def acceptance_by_context(name: str, answers: Sequence[Answer]) -> Curve | None:
    """Return the share of accepted tokens against the context's length before the draft."""
    cycles = [cycle for answer in answers for cycle in answer.cycles() if cycle[1]]
    if not cycles:
        return None
    contexts = [context for context, _, _ in cycles]
    width = round_width((max(contexts) - min(contexts) + 1) / MAX_CURVE_POINTS)
    counts: dict[int, list[int]] = {}
    for context, proposed, accepted in cycles:
        count = counts.setdefault(context // width, [0, 0])
        count[0] += proposed
        count[1] += accepted
    return share_curve(name, {width * (index + 0.5): its for index, its in counts.items()})


def acceptance_by_position(name: str, answers: Sequence[Answer]) -> Curve | None:
    """Return the share of accepted tokens at each position of the drafts."""
    counts: dict[float, list[int]] = {}
    for answer in answers:
        for _, proposed, accepted in answer.cycles():
            for position in range(1, proposed + 1):
                count = counts.setdefault(position, [0, 0])
                count[0] += 1
                count[1] += position <= accepted
    return share_curve(name, counts)


def share_curve(name: str, counts: Mapping[float, Sequence[int]]) -> Curve | None:
    """Return acceptance rates as a curve.

    Args:
        name: The curve's label.
        counts: The number of tokens that were drafted and accepted, by position on the x axis.

    Returns:
        None if no point has `MIN_DRAFTED_TOKENS` tokens.
    """
    known = {
        x: taken / drawn
        for x, (drawn, taken) in sorted(counts.items())
        if drawn >= MIN_DRAFTED_TOKENS
    }
    return Curve(name, list(known), list(known.values())) if known else None


def round_width(width: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that is not below a width."""
    power = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width)


def speedup_by_length(
    plan: Plan, answers: Iterable[Answer]
) -> Callable[[str, list[Answer]], Curve | None]:
    """Return a function that makes a strategy's curve of speedup against the reference's length."""
    reference = reference_of(plan, answers)

    def curve(name: str, own: list[Answer]) -> Curve | None:
        classes: dict[int, list[Answer]] = {}
        for answer in own:
            classes.setdefault(length_class(len(reference[key_of(answer)].tokens)), []).append(
                answer
            )
        found = {
            length: ratios(its, reference, whole=True) for length, its in sorted(classes.items())
        }
        return None if name == next(iter(plan.strategies)) else spread_curve(name, found)

    return curve


Key = tuple[str, str, int | None]


def key_of(answer: Answer) -> Key:
    """Return the task, the item and the image size of an answer."""
    return answer.task, answer.item, answer.size


def reference_of(plan: Plan, answers: Iterable[Answer]) -> dict[Key, Answer]:
    """Return the first strategy's answers."""
    first = next(iter(plan.strategies))
    return {key_of(answer): answer for answer in answers if answer.strategy == first}


def ratios(
    own: Sequence[Answer], reference: Mapping[Key, Answer], *, whole: bool = False
) -> Spread | None:
    """Return the speedup of answers, question by question.

    Args:
        own: A strategy's answers.
        reference: The answers to compare with.
        whole: Whether to compare the time of whole replies, image and prefill included, instead of
            the time per output token after the first.

    Returns:
        None where no reply has more than one token.
    """
    ordinary = [reference[key_of(answer)].statistics for answer in own]
    return speedup(ordinary, [answer.statistics for answer in own], whole=whole)


def spread_curve(name: str, points: Mapping[Any, Spread | None]) -> Curve | None:
    """Return medians with their quartiles as a curve."""
    known = {x: spread for x, spread in sorted(points.items()) if spread is not None}
    if not known:
        return None
    spreads = list(known.values())
    return Curve(
        name,
        list(known),
        [spread.median for spread in spreads],
        [spread.low for spread in spreads],
        [spread.high for spread in spreads],
    )


def settings_charts(plan: Plan, answers: Sequence[Answer]) -> list[Chart]:
    """Return the speedup against exit layer and draft length, where a kind has several of one."""
    reference = reference_of(plan, answers)
    own: dict[str, list[Answer]] = {}
    for answer in answers:
        own.setdefault(answer.strategy, []).append(answer)
    exits: dict[str, dict[int, Spread | None]] = {}
    lengths: dict[str, dict[int, Spread | None]] = {}
    for name, what in plan.strategies.items():
        speed = ratios(own.get(name, []), reference)
        length, layer, kind = what["draft_length"], what["exit_layer"], what["kind"]
        if length is not None:
            lengths.setdefault(name.rpartition(":")[0], {})[length] = speed
        elif layer is not None:
            exits.setdefault(kind, {})[layer] = speed
    found = []
    for name, label, series in (
        ("exit layer", "exit layer (layers that draft)", exits),
        ("draft length", "draft length (tokens of every draft)", lengths),
    ):
        several = any(len(points) > 1 for points in series.values())
        curves = [spread_curve(kind, points) for kind, points in series.items() if several]
        found.append(
            Chart(
                f"speedup_by_{name.replace(' ', '_')}",
                f"Speedup against {name}",
                label,
                "speedup per token after the first",
                [curve for curve in curves if curve is not None],
                "Medians and quartiles, all tasks together.",
            )
        )
    return found


def quality_charts(plan: Plan, rows: Sequence[ScoreRow]) -> list[Chart]:
    """Return each task's quality against the time to first token, where images had sizes."""
    first = next(iter(plan.strategies))
    found = []
    for task in plan.tasks if len(plan.sizes) > 1 else ():
        points = [
            (row.speed.ttft_ms, row.scores[headline(task)], row.size)
            for row in rows
            if row.task == task and row.strategy == first and row.speed and row.scores
        ]
        curves = [
            Curve(
                headline(task),
                [ttft.median for ttft, _, _ in points],
                [score for _, score, _ in points],
                notes=[f"{size} px" for _, _, size in points],
            )
        ]
        found.append(
            Chart(
                f"quality_by_ttft_{task.replace(':', '_')}",
                f"{plan.tasks[task].name}: quality against time to first token",
                "time to first token, ms (median)",
                headline(task),
                curves if points else [],
                "A point for each size of the images.",
            )
        )
    return found
