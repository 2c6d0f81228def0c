"""A pass over an evaluation's items: every strategy answers an item before the next one begins."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastvlm
from fastvlm.data.broken import MAX_BROKEN_SHARE, BrokenRecords
from fastvlm.data.conversations import Broken
from fastvlm.decoding import Strategy
from fastvlm.evaluation.likelihood import likelihoods
from fastvlm.evaluation.measuring import hardware, no_progress, rotated, run_request
from fastvlm.evaluation.tasks.answers import Answer, Failure, Journal, Ratings
from fastvlm.evaluation.tasks.plan import Plan, PlannedItem
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import locked
from fastvlm.vision.images import ImageOptions
from fastvlm.vlm import VisionLanguageModel


def evaluate(
    vlm: VisionLanguageModel,
    strategies: Mapping[str, Strategy],
    plan: Plan,
    journal: Journal,
    progress: Callable[[int, int], None] = no_progress,
    max_failed: float = MAX_BROKEN_SHARE,
) -> None:
    """Ask every question that the journal has no answer to, those that failed before included.

    An item that can't be asked, such as one whose image can't be read, is recorded with the reason,
    and the evaluation goes on.

    The order of the strategies rotates. Options are rated once, as the ratings don't depend on the
    strategy. The first item is answered once beforehand without being measured.

    Args:
        vlm: The model.
        strategies: The plan's strategies by name.
        plan: The evaluation's plan.
        journal: Where findings are recorded.
        progress: Called with the questions done and their total, of those that were left.
        max_failed: The maximum share of all questions that may fail, from 0 to 1.

    Raises:
        InputError: More questions fail, or another run writes to the journal's folder.
    """
    with locked(journal.file.parent):
        _ask(vlm, strategies, plan, journal, progress, max_failed)


def _ask(
    vlm: VisionLanguageModel,
    strategies: Mapping[str, Strategy],
    plan: Plan,
    journal: Journal,
    progress: Callable[[int, int], None],
    max_failed: float,
) -> None:
    names = list(strategies)
    left = [
        (number, asked, missing)
        for number, asked in enumerate(plan)
        if (missing := unknown(journal, asked, rotated(names, number)))
    ]
    if not left:
        return
    journal.begin(session(vlm))
    warm: set[int | None] = set()
    failed = BrokenRecords(max_failed, what="items", failed="failed")
    failed.seen = sum(1 for _ in plan) - len(left)
    for done, (_, asked, missing) in enumerate(left, 1):
        failed.see()
        key = (asked.task, asked.item.id, asked.size)
        try:
            if asked.item.options:
                journal.add(rated(vlm, asked))
            else:
                if asked.size not in warm:
                    for strategy in strategies.values():
                        answer(vlm, "", strategy, asked, plan.max_new_tokens)
                    warm.add(asked.size)
                for name in missing:
                    journal.add(answer(vlm, name, strategies[name], asked, plan.max_new_tokens))
        except InputError as error:
            journal.add(Failure(*key, str(error)))
            failed.add(Broken(f"{asked.task}, item {asked.item.id}", str(error)))
        progress(done, len(left))
    failed.check()


def unknown(journal: Journal, asked: PlannedItem, names: list[str]) -> list[str]:
    """Return the names of the strategies whose answer is missing.

    Args:
        journal: The answers so far.
        asked: The question.
        names: All strategies.

    Returns:
        The names; "the model" alone for options that are not rated yet, as no strategy rates them.
    """
    key = (asked.task, asked.item.id, asked.size)
    if asked.item.options:
        return [] if key in journal.ratings else ["the model"]
    return [name for name in names if (*key, name) not in journal.answers]


def shown(asked: PlannedItem) -> ImageOptions:
    """Return how a question's image is shown."""
    return {} if asked.size is None else {"image_size": asked.size}


def answer(
    vlm: VisionLanguageModel, name: str, strategy: Strategy, asked: PlannedItem, limit: int
) -> Answer:
    """Return a strategy's answer to a question.

    Args:
        vlm: The model.
        name: The strategy's name.
        strategy: The strategy.
        asked: The question.
        limit: The maximum number of tokens in the reply.

    Raises:
        InputError: The image can't be read, or the prompt doesn't fit into the model's context.
    """
    item = asked.item
    options = {"max_new_tokens": limit, **shown(asked)}
    request = run_request(vlm, strategy, item.prompt, item.open(), **options)
    reply = vlm.reply(request)
    return Answer(
        asked.task,
        item.id,
        asked.size,
        name,
        reply.text.strip(),
        reply.token_ids,
        len(reply.prompt_token_ids),
        reply.statistics.ttft_ms,
        reply.statistics.tpot_ms,
        request.proposed,
        request.accepted,
    )


def rated(vlm: VisionLanguageModel, asked: PlannedItem) -> Ratings:
    """Return the log-likelihood of each option as the model's whole reply."""
    item = asked.item
    request = vlm.request(item.prompt, item.open(), **shown(asked))
    found = likelihoods(vlm, request, item.options)
    return Ratings(asked.task, item.id, asked.size, [one.whole for one in found])


def session(vlm: VisionLanguageModel) -> dict[str, Any]:
    """Return the date, versions and hardware of a measurement."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "fastvlm": fastvlm.__version__,
        "commit": commit(),
        "hardware": hardware(vlm.decoder.device, vlm.decoder.runtime),
    }


def commit() -> str | None:
    """Return the commit of the code; None where fastvlm is installed without its repository."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
            check=False,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() if tracked.returncode == 0 else None
