"""LLaVA-Bench (in the wild): open questions, replies compared by a judge (Liu et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastvlm.data.tasks.files import find, locate
from fastvlm.data.tasks.task import Item, check_replies
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_json_lines, reads
from fastvlm.metrics.judged import relative_scores


@dataclass(frozen=True, slots=True)
class LlavaWild:
    """LLaVA-Bench's questions.

    Attributes:
        items: The questions.
        contexts: What the image shows, by item: for a judge that can't see it.
        references: The answers that replies are compared with, by item.
        categories: `conv`, `detail` or `complex`, by item.
        name: The benchmark's name in a table.
    """

    items: Sequence[Item]
    contexts: Mapping[str, str]
    references: Mapping[str, str]
    categories: Mapping[str, str]
    name: str = "LLaVA-Bench (in the wild)"
    judged: ClassVar[bool] = True

    def score(self, replies: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Return the relative score of each category and of `all`, 0 to 100; see `EvaluationTask`.

        Args:
            replies: By item, the judge's grades of the reference and of the reply.

        Raises:
            InputError: An item has no grades, grades no item, or they are not positive.
        """
        check_replies(self.items, replies)
        return relative_scores(replies, self.categories)


@reads("LLaVA-Bench's files")
def llava_wild(folder: Path) -> LlavaWild:
    """Read LLaVA-Bench's 60 questions about 24 images.

    Args:
        folder: Holds `questions.jsonl`, `context.jsonl`, `answers_gpt4.jsonl` and the images in
            `images/`.

    Raises:
        InputError: A file or images are missing, or a question has no context or reference.
    """
    asked = {
        str(line["question_id"]): line for line in read_json_lines(find(folder, "questions.jsonl"))
    }
    shown = {
        line["image"]: line["caption"] for line in read_json_lines(find(folder, "context.jsonl"))
    }
    references = {
        str(line["question_id"]): line["text"]
        for line in read_json_lines(find(folder, "answers_gpt4.jsonl"))
    }
    for key, line in asked.items():
        if line["image"] not in shown or key not in references:
            raise InputError(f"Question {key} of {folder} has no context or no reference answer.")
    names = dict.fromkeys(line["image"] for line in asked.values())
    images = locate(folder, {name: [f"images/{name}"] for name in names})
    return LlavaWild(
        tuple(Item(key, line["text"], images[line["image"]]) for key, line in asked.items()),
        {key: shown[line["image"]] for key, line in asked.items()},
        {key: references[key] for key in asked},
        {key: line["category"] for key, line in asked.items()},
    )


@reads("LLaVA-Bench's reviews")
def read_reviews(path: Path) -> dict[str, tuple[float, float]]:
    """Return the judge's grades of reference and reply, by item, from LLaVA's file of reviews.

    Raises:
        InputError: A line is no JSON.
    """
    return {
        str(line["question_id"]): (line["tuple"][0], line["tuple"][1])
        for line in read_json_lines(path)
    }
