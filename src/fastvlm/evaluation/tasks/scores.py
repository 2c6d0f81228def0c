"""The scores of an evaluation: quality, speed and acceptance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastvlm.data.tasks import EvaluationTask
from fastvlm.evaluation.measuring import speedup
from fastvlm.evaluation.tasks.answers import Answer, Journal
from fastvlm.evaluation.tasks.grades import Graded
from fastvlm.evaluation.tasks.plan import Plan
from fastvlm.functional.statistics import DecodingStatistics, Spread

HEADLINE_SCORES = {
    "coco": "CIDEr",
    "nocaps": "CIDEr",
    "flickr8k": "CIDEr",
    "visdial": "MRR",
    "vqav2": "accuracy",
    "textvqa": "accuracy",
    "docvqa": "ANLS",
    "mmmu": "overall",
    "pope": "F1",
    "mmvet": "total",
    "llava-wild": "all",
}
"""Each task's main score, which is shown in the table of all tasks."""


def headline(task: str) -> str:
    """Return the name of a task's main score."""
    return HEADLINE_SCORES[task.partition(":")[0].replace("_", "-")]


@dataclass(frozen=True, slots=True)
class Speed:
    """Timings and acceptance of replies, with the spread over the replies.

    Args:
        replies: The number of replies.
        tokens: Tokens of a reply.
        ttft_ms: Time to first token, in milliseconds.
        tpot_ms: Time per output token after the first, in milliseconds.
        decode_rate: Tokens per second after the first token.
        whole_rate: Tokens per second, image and prefill included.
        passes: Calls of the full model, prefill included.
        acceptance_rate: Accepted tokens per drafted token.
        acceptance_length: Tokens per call of the full model after the prefill.
        draft_length: Drafted tokens per such call.
        speedup: The reference's time per output token over that of these replies.
        speedup_end_to_end: The same for whole replies.
    """

    replies: int
    tokens: Spread
    ttft_ms: Spread
    tpot_ms: Spread | None
    decode_rate: Spread | None
    whole_rate: Spread
    passes: Spread
    acceptance_rate: Spread | None
    acceptance_length: Spread | None
    draft_length: Spread | None
    speedup: Spread | None
    speedup_end_to_end: Spread | None

    @classmethod
    def of(cls, own: Sequence[Answer], reference: Sequence[Answer]) -> Speed:
        """Return the timings of a strategy's answers, given the reference's to the same items."""
        mine = [answer.statistics for answer in own]
        ordinary = [answer.statistics for answer in reference]
        tpot = [one.tpot_ms for one in mine if one.tpot_ms is not None]
        return cls(
            replies=len(own),
            tokens=Spread.of([one.tokens for one in mine]),
            ttft_ms=Spread.of([one.ttft_ms for one in mine]),
            tpot_ms=_spread(tpot),
            decode_rate=_spread([1e3 / ms for ms in tpot]),
            whole_rate=Spread.of([1e3 * one.tokens / one.total_ms for one in mine]),
            passes=Spread.of([1 + one.cycles for one in mine]),
            acceptance_rate=_spread([one.acceptance_rate for one in mine]),
            acceptance_length=_spread([one.acceptance_length for one in mine]),
            draft_length=_spread([drafted(one) for one in mine]),
            speedup=speedup(ordinary, mine),
            speedup_end_to_end=speedup(ordinary, mine, whole=True),
        )


def drafted(one: DecodingStatistics) -> float | None:
    """Return the drafted tokens per cycle; None where nothing was drafted."""
    return one.proposed / one.cycles if one.proposed else None


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """The result of one strategy on one task, with images of one size.

    Args:
        task: The task's name.
        size: Side of the images in pixels; None for the model's own.
        strategy: The strategy's name.
        scores: The task's scores by name; None where replies were not judged.
        different: The number of replies whose tokens differ from the reference's.
        speed: Timings and acceptance; None where options were rated and nothing was generated.
        by_length: The same by reply length in tokens, rounded up to a power of two.
    """

    task: str
    size: int | None
    strategy: str
    scores: Mapping[str, float] | None
    different: int
    speed: Speed | None
    by_length: Mapping[int, Speed]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON has them, spreads as median, low and high."""
        return asdict(self)


def length_class(tokens: int) -> int:
    """Return a reply's length rounded up to a power of two, at least 4."""
    return max(4, 1 << (tokens - 1).bit_length())


def rows(plan: Plan, journal: Journal, graded: Graded) -> list[ScoreRow]:
    """Return the scores and speeds of a finished evaluation, in the plan's order.

    Args:
        plan: The evaluation's plan.
        journal: The answers.
        graded: The grades of replies that a judge has graded.
    """
    found = []
    names = list(plan.strategies)
    for task_name, task in plan.tasks.items():
        for size in plan.sizes:
            if task.items[0].options:
                ratings = {
                    item.id: journal.ratings[task_name, item.id, size].ratings
                    for item in task.items
                }
                found.append(ScoreRow(task_name, size, names[0], task.score(ratings), 0, None, {}))
                continue
            by_name = {
                name: [journal.answers[task_name, item.id, size, name] for item in task.items]
                for name in names
            }
            reference = by_name[names[0]]
            # Equal replies are scored once: a few of the metrics take minutes.
            known: dict[tuple[str, ...], Mapping[str, float] | None] = {}
            for name, own in by_name.items():
                texts = tuple(answer.text for answer in own)
                if texts not in known:
                    known[texts] = quality(task, own, graded)
                found.append(
                    ScoreRow(
                        task_name,
                        size,
                        name,
                        known[texts],
                        sum(
                            list(one.tokens) != list(other.tokens)
                            for one, other in zip(own, reference, strict=True)
                        ),
                        Speed.of(own, reference),
                        by_length(own, reference),
                    )
                )
    return found


def quality(
    task: EvaluationTask[Any], answers: Sequence[Answer], graded: Graded
) -> Mapping[str, float] | None:
    """Return a task's scores of one strategy's answers.

    Args:
        task: The task.
        answers: The strategy's answers.
        graded: The grades of replies that a judge has graded.

    Returns:
        The scores by name; None where a grade is missing.
    """
    if not task.judged:
        return task.score({answer.item: answer.text for answer in answers})
    keys = {answer.item: (answer.task, answer.item, answer.text) for answer in answers}
    if any(key not in graded for key in keys.values()):
        return None
    return task.score({item: graded[key] for item, key in keys.items()})


def by_length(own: Sequence[Answer], reference: Sequence[Answer]) -> dict[int, Speed]:
    """Return the speed of replies of similar length, by the reference's length."""
    classes: dict[int, list[tuple[Answer, Answer]]] = {}
    for one, other in zip(own, reference, strict=True):
        classes.setdefault(length_class(len(other.tokens)), []).append((one, other))
    return {
        length: Speed.of([one for one, _ in pairs], [other for _, other in pairs])
        for length, pairs in sorted(classes.items())
    }
