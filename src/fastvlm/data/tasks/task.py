"""What all tasks have in common: items to ask, and a score of what came back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from fastvlm.functional.errors import InputError

SHORT_ANSWER_PROMPT = "Answer the question using a single word or phrase."
CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."

Given = ParamSpec("Given")
Reply_contra = TypeVar("Reply_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Item:
    """What a task asks about one image.

    Attributes:
        id: Names the item in `score`; no other item of the task has it.
        prompt: The question, as LLaVA-1.5 asks it, the image standing before it.
        image: The image's path, or its file's bytes where the data set packs images.
        options: Answers to be ranked by the model's log-likelihoods; empty where it writes its own.
    """

    id: str
    prompt: str
    image: Path | bytes
    options: tuple[str, ...] = ()

    def open(self) -> Path | bytes:
        """Return the image as a model accepts it."""
        return self.image


class EvaluationTask(Protocol[Reply_contra]):
    """A benchmark whose files were read.

    What `score` takes for an item is the model's text (str); for Visual Dialog the
    log-likelihood of each option; for MM-Vet and LLaVA-Bench a judge's grades.
    """

    @property
    def name(self) -> str:
        """The benchmark's name in a table."""

    @property
    def items(self) -> Sequence[Item]:
        """What is asked, in the order of the publisher's file."""

    @property
    def judged(self) -> bool:
        """Whether `score` takes a judge's grades of the model's text, and not the text."""

    def score(self, replies: Mapping[str, Reply_contra]) -> dict[str, float]:
        """Score the replies by the names that papers print.

        Args:
            replies: One for each item, by its id. To score a part, `dataclasses.replace` the items.

        Raises:
            InputError: An item has no reply, or a reply no item.
        """


def check_replies(items: Sequence[Item], replies: Mapping[str, object]) -> None:
    """Check that there are items, and exactly one reply for each.

    Raises:
        InputError: There are none, or a reply is missing or belongs to no item.
    """
    if not items:
        raise InputError("There are no items to score.")
    asked = {item.id for item in items}
    unmatched = asked ^ replies.keys()
    if unmatched:
        first = min(unmatched)
        lacks = "has no reply" if first in asked else "was never asked"
        raise InputError(
            f"There must be one reply for each item, but {len(unmatched)} don't match:"
            f" {first!r} {lacks}."
        )


def checked(loader: Callable[Given, EvaluationTask[Any]]) -> Callable[Given, EvaluationTask[Any]]:
    """Make a loader refuse a task without items, or with prompts that are not text."""

    @functools.wraps(loader)
    def load(*args: Given.args, **kwargs: Given.kwargs) -> EvaluationTask[Any]:
        task = loader(*args, **kwargs)
        if not task.items:
            raise InputError(f"There is nothing to ask in the files of {task.name}.")
        for item in task.items:
            if not isinstance(item.prompt, str):
                raise InputError(f"The prompt of {task.name}'s item {item.id} is no text.")
        return task

    return load
