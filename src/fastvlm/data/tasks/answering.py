"""Questions with short answers as a task: the mean of a score that each reply has by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import ClassVar

from fastvlm.data.tasks.task import Item, check_replies
from fastvlm.functional.errors import InputError


@dataclass(frozen=True, slots=True)
class Answering:
    """A task of questions with short answers.

    Attributes:
        name: The benchmark's name in a table.
        items: The questions.
        metric: What the mean is called.
        measure: Scores a reply against the answers, 0 to 1.
        answers: The right answers, by item.
        kinds: By item, a kind of question that is averaged apart as well; may be empty.
    """

    name: str
    items: Sequence[Item]
    metric: str
    measure: Callable[[str, Sequence[str]], float]
    answers: Mapping[str, Sequence[str]]
    kinds: Mapping[str, str] = field(default_factory=dict)
    judged: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check that all answers are texts.

        Raises:
            InputError: Some are not.
        """
        for key, answers in self.answers.items():
            if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
                raise InputError(f"The answers to {self.name}'s item {key} are no texts.")

    def score(self, replies: Mapping[str, str]) -> dict[str, float]:
        """Return the mean over all items and over each kind, 0 to 1; see `EvaluationTask`.

        Raises:
            InputError: An item has no reply, or a reply no item.
        """
        check_replies(self.items, replies)
        values: dict[str, list[float]] = {self.metric: []}
        for item in self.items:
            value = self.measure(replies[item.id], self.answers[item.id])
            values[self.metric].append(value)
            if item.id in self.kinds:
                values.setdefault(f"{self.metric} {self.kinds[item.id]}", []).append(value)
        return {name: fmean(its) for name, its in values.items()}
