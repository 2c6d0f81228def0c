"""The findings of an evaluation: answers, ratings of options, and the journal of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastvlm.data.journal import append_line, whole_lines
from fastvlm.evaluation.tasks.plan import Plan, with_items
from fastvlm.functional.errors import InputError
from fastvlm.functional.statistics import DecodingStatistics


@dataclass(frozen=True, slots=True)
class Answer:
    """One strategy's answer to one item.

    Args:
        task: The task's name.
        item: The item's id.
        size: Side of the image in pixels; None for the model's own.
        strategy: The strategy's name.
        text: The reply.
        tokens: The reply's tokens, the end token included.
        prompt_tokens: Tokens of the prompt with its image.
        ttft_ms: Time to first token, image included, in milliseconds.
        tpot_ms: Time per output token after the first, in milliseconds; None for one token.
        proposed: Drafted tokens of each cycle.
        accepted: Accepted tokens of each cycle.
    """

    task: str
    item: str
    size: int | None
    strategy: str
    text: str
    tokens: Sequence[int]
    prompt_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    proposed: Sequence[int]
    accepted: Sequence[int]

    @property
    def statistics(self) -> DecodingStatistics:
        """Timings and acceptance."""
        return DecodingStatistics(
            len(self.tokens),
            self.ttft_ms,
            self.tpot_ms,
            len(self.proposed),
            sum(self.proposed),
            sum(self.accepted),
        )

    def cycles(self) -> Iterator[tuple[int, int, int]]:
        """Yield each cycle's context length, and the tokens that it drafted and accepted.

        The context is everything before the cycle: prompt, image and the reply so far.
        """
        context = self.prompt_tokens + 1
        for proposed, accepted in zip(self.proposed, self.accepted, strict=True):
            yield context, proposed, accepted
            context += accepted + 1


@dataclass(frozen=True, slots=True)
class Ratings:
    """The log-likelihoods of an item's options, which don't depend on the strategy.

    Args:
        task: The task's name.
        item: The item's id.
        size: Side of the image in pixels; None for the model's own.
        ratings: The log-likelihood of each option.
    """

    task: str
    item: str
    size: int | None
    ratings: Sequence[float]


@dataclass(frozen=True, slots=True)
class Failure:
    """An item that could not be asked.

    Args:
        task: The task's name.
        item: The item's id.
        size: Side of the image in pixels; None for the model's own.
        reason: The reason, in a sentence.
    """

    task: str
    item: str
    size: int | None
    reason: str


class Journal:
    """The findings of an evaluation, in memory and in a file.

    Args:
        file: The file; a stopped evaluation resumes from it.
        plan: The evaluation's plan.

    Raises:
        InputError: The file belongs to another evaluation, or a line of it is broken.
    """

    def __init__(self, file: Path, plan: Plan) -> None:
        self.file = file
        self.strategies = tuple(plan.strategies)
        self.sessions: list[dict[str, Any]] = []
        """When, on what and by what version the answers were measured."""
        self.answers: dict[tuple[str, str, int | None, str], Answer] = {}
        self.ratings: dict[tuple[str, str, int | None], Ratings] = {}
        self.failures: dict[tuple[str, str, int | None], Failure] = {}
        """Items that failed and were not answered since."""
        header = {"plan": plan.to_json()}
        lines = whole_lines(file)
        if not lines:
            append_line(file, header)
        elif lines[0] != header:
            raise InputError(
                f"{file} belongs to another evaluation ({difference(lines[0], header)});"
                " choose another --output."
            )
        for number, line in enumerate(lines[1:], 2):
            try:
                self._take(line)
            except (KeyError, TypeError) as error:
                raise InputError(
                    f"Line {number} of {file} is no entry of an evaluation."
                ) from error

    def _take(self, line: dict[str, Any]) -> None:
        if "session" in line:
            self.sessions.append(line["session"])
        elif "reason" in line:
            failure = Failure(**line)
            self.failures[failure.task, failure.item, failure.size] = failure
        elif "ratings" in line:
            found = Ratings(**line)
            self.ratings[found.task, found.item, found.size] = found
            self.failures.pop((found.task, found.item, found.size), None)
        else:
            answer = Answer(**line)
            key = (answer.task, answer.item, answer.size)
            self.answers[*key, answer.strategy] = answer
            # What failed before and was mended since is known again once all have answered.
            if all((*key, name) in self.answers for name in self.strategies):
                self.failures.pop(key, None)

    def add(self, found: Answer | Ratings | Failure) -> None:
        """Add a finding."""
        self._write(asdict(found))

    def begin(self, session: dict[str, Any]) -> None:
        """Record the date, versions and hardware of the findings from here on."""
        self._write({"session": session})

    def _write(self, line: dict[str, Any]) -> None:
        append_line(self.file, line)
        self._take(line)


def left_out(plan: Plan, journal: Journal) -> Plan:
    """Return a plan without the items that failed at any size, and remove their answers.

    So every strategy and size is measured on the same items. A task without items is left out.

    Raises:
        InputError: No item of any task is left.
    """
    failed = {(one.task, one.item) for one in journal.failures.values()}
    answers, ratings = journal.answers, journal.ratings
    journal.answers = {key: one for key, one in answers.items() if key[:2] not in failed}
    journal.ratings = {key: one for key, one in ratings.items() if key[:2] not in failed}
    tasks = {
        name: with_items(task, tuple(one for one in task.items if (name, one.id) not in failed))
        for name, task in plan.tasks.items()
    }
    if not any(task.items for task in tasks.values()):
        first = next(iter(journal.failures.values()))
        raise InputError(
            f"None of the items could be asked; {first.task}, item {first.item}: {first.reason}"
        )
    return replace(plan, tasks={name: task for name, task in tasks.items() if task.items})


def recorded_plan(file: Path) -> dict[str, Any]:
    """Return the plan at the beginning of a journal; an empty one if there is no journal."""
    lines = whole_lines(file)
    return lines[0].get("plan", {}) if lines and isinstance(lines[0], dict) else {}


def difference(found: Any, wanted: Any) -> str:
    """Return a description of the parts in which two plans differ."""
    ours, theirs = wanted["plan"], found.get("plan", {}) if isinstance(found, dict) else {}
    names = [name for name in ours if ours[name] != theirs.get(name)]
    return f"other {', '.join(name.replace('_', ' ') for name in names)}"
