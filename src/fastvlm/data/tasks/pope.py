"""POPE: is there such an object in the image? (Li et al. 2023, arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from fastvlm.data.tasks.files import find, locate
from fastvlm.data.tasks.task import SHORT_ANSWER_PROMPT, Item, check_replies
from fastvlm.functional.text_files import read_json_lines, reads
from fastvlm.metrics.yes_no import says_yes, yes_no_scores

POPE_SAMPLINGS = ("random", "popular", "adversarial")
"""The ways in which absent objects were sampled."""


@dataclass(frozen=True, slots=True)
class Pope:
    """POPE's questions.

    Attributes:
        items: The questions; their ids begin with their sampling, `random/17`.
        present: Whether yes is right, by item.
        name: The benchmark's name in a table.
    """

    items: Sequence[Item]
    present: Mapping[str, bool]
    name: str = "POPE"
    judged: ClassVar[bool] = False

    def score(self, replies: Mapping[str, str]) -> dict[str, float]:
        """Return `accuracy`, `precision`, `recall`, `F1` and `yes ratio`, 0 to 1.

        Each is the mean over the samplings, and is given for each sampling, as `F1 random`.

        Raises:
            InputError: An item has no reply, or a reply no item.
        """
        check_replies(self.items, replies)
        members: dict[str, list[str]] = {}
        for item in self.items:
            members.setdefault(item.id.split("/")[0], []).append(item.id)
        scores = {
            sampling: yes_no_scores(
                [says_yes(replies[item]) for item in its], [self.present[item] for item in its]
            )
            for sampling, its in members.items()
        }
        metrics = list(next(iter(scores.values())))
        means = {metric: fmean(its[metric] for its in scores.values()) for metric in metrics}
        return means | {
            f"{metric} {sampling}": its[metric]
            for sampling, its in scores.items()
            for metric in its
        }


@reads("POPE's files")
def pope(folder: Path) -> Pope:
    """Read POPE on COCO: 3,000 questions of each sampling.

    Args:
        folder: Holds `coco_pope_random.json`, `coco_pope_popular.json` and
            `coco_pope_adversarial.json`, here or in `coco/`, and COCO's images in `val2014/` or
            `images/`.

    Raises:
        InputError: A file or images are missing.
    """
    lines = {
        sampling: read_json_lines(
            find(folder, f"coco_pope_{sampling}.json", f"coco/coco_pope_{sampling}.json")
        )
        for sampling in POPE_SAMPLINGS
    }
    asked = {
        f"{sampling}/{line['question_id']}": line for sampling in lines for line in lines[sampling]
    }
    images = locate(
        folder,
        {
            line["image"]: (f"val2014/{line['image']}", f"images/{line['image']}")
            for line in asked.values()
        },
    )
    items = tuple(
        Item(key, f"{line['text']}\n{SHORT_ANSWER_PROMPT}", images[line["image"]])
        for key, line in asked.items()
    )
    return Pope(items, {key: line["label"] == "yes" for key, line in asked.items()})
