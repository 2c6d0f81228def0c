"""MM-Vet: open questions that take several capabilities, graded by a judge (Yu et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastvlm.data.tasks.files import find, locate
from fastvlm.data.tasks.task import Item, check_replies
from fastvlm.functional.text_files import read_json, reads
from fastvlm.metrics.judged import capability_scores


@dataclass(frozen=True, slots=True)
class MmVet:
    """MM-Vet's questions.

    Attributes:
        items: The questions.
        answers: The right answers, by item, `<AND>` and `<OR>` between their parts: for the judge.
        capabilities: What each takes, by item.
        name: The benchmark's name in a table.
    """

    items: Sequence[Item]
    answers: Mapping[str, str]
    capabilities: Mapping[str, Sequence[str]]
    name: str = "MM-Vet"
    judged: ClassVar[bool] = True

    def score(self, replies: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return the mean grade of each capability and the `total`, 0 to 100; see `EvaluationTask`.

        Args:
            replies: By item, the grade of its reply (0 to 1) in each of the judge's runs.

        Raises:
            InputError: An item has no grades, grades no item, or one is outside 0 to 1.
        """
        check_replies(self.items, replies)
        return capability_scores(replies, self.capabilities)


@reads("MM-Vet's files")
def mmvet(folder: Path) -> MmVet:
    """Read MM-Vet's 218 questions.

    Args:
        folder: Holds `mm-vet.json` and the images in `images/`.

    Raises:
        InputError: The file or images are missing.
    """
    asked = read_json(find(folder, "mm-vet.json"))
    names = {line["imagename"] for line in asked.values()}
    images = locate(folder, {name: [f"images/{name}"] for name in sorted(names)})
    return MmVet(
        tuple(
            Item(key, line["question"], images[line["imagename"]]) for key, line in asked.items()
        ),
        {key: line["answer"] for key, line in asked.items()},
        {key: tuple(line["capability"]) for key, line in asked.items()},
    )


@reads("MM-Vet's grades")
def read_grades(path: Path) -> dict[str, list[float]]:
    """Return the grades of each run, by item, from a file of MM-Vet's own evaluator.

    Raises:
        InputError: It is no JSON.
    """
    return {key: grades["score"] for key, grades in read_json(path).items()}
