"""Visual Dialog v1.0: in each round, 100 answers to be ranked (Das et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from fastvlm.data.tasks.files import find, locate
from fastvlm.data.tasks.task import SHORT_ANSWER_PROMPT, Item, check_replies
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_json, reads
from fastvlm.metrics.ranking import ndcg, rank_options, retrieval_scores


@dataclass(frozen=True, slots=True)
class VisDial:
    """Rounds of dialogues.

    Attributes:
        items: The rounds, each with its options; their ids are `image/round`, rounds from 1 on.
        answers: Which option the human gave, by item, from 0 on.
        relevance: The share of people who found each option right, for one round of a dialogue.
        name: The benchmark's name in a table.
    """

    items: Sequence[Item]
    answers: Mapping[str, int]
    relevance: Mapping[str, Sequence[float]]
    name: str = "VisDial"
    judged: ClassVar[bool] = False

    def score(self, replies: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return `R@1`, `R@5`, `R@10`, `MRR`, `mean rank` and `NDCG`; see `EvaluationTask`.

        NDCG is the mean over the items with dense relevance, and left out where none has it.

        Args:
            replies: By item, the log-likelihood of each option (any score: higher is better).

        Raises:
            InputError: An item has no reply, a reply no item, or not one number for each option.
        """
        check_replies(self.items, replies)
        ranks = {}
        for item in self.items:
            if len(replies[item.id]) != len(item.options):
                raise InputError(
                    f"Item {item.id!r} has {len(item.options)} options, but"
                    f" {len(replies[item.id])} log-likelihoods."
                )
            ranks[item.id] = rank_options(replies[item.id])
        scores = retrieval_scores([its[self.answers[item]] for item, its in ranks.items()])
        dense = [
            ndcg(its, self.relevance[item]) for item, its in ranks.items() if item in self.relevance
        ]
        return scores | {"NDCG": fmean(dense)} if dense else scores


@reads("Visual Dialog's files")
def visdial(folder: Path) -> VisDial:
    """Read Visual Dialog's validation set: 2,064 dialogues of ten rounds.

    Args:
        folder: Holds `visdial_1.0_val.json`, `visdial_1.0_val_dense_annotations.json` and the
            images in `VisualDialog_val2018/` or `images/`.

    Raises:
        InputError: A file or images are missing.
    """
    content = read_json(find(folder, "visdial_1.0_val.json"))["data"]
    annotations = read_json(find(folder, "visdial_1.0_val_dense_annotations.json"))
    images = locate(
        folder,
        {
            str(dialogue["image_id"]): [
                f"{place}/VisualDialog_val2018_{dialogue['image_id']:012}.jpg"
                for place in ("VisualDialog_val2018", "images")
            ]
            for dialogue in content["dialogs"]
        },
    )
    items = []
    answers = {}
    for dialogue in content["dialogs"]:
        image = str(dialogue["image_id"])
        for number, turn in enumerate(dialogue["dialog"], 1):
            key = f"{image}/{number}"
            options = tuple(content["answers"][option] for option in turn["answer_options"])
            items.append(Item(key, _prompt(content, dialogue, number), images[image], options))
            answers[key] = turn["gt_index"]
    relevance = {
        f"{annotation['image_id']}/{annotation['round_id']}": annotation["gt_relevance"]
        for annotation in annotations
    }
    return VisDial(tuple(items), answers, relevance)


def _prompt(content: Any, dialogue: Any, number: int) -> str:
    """The caption, the rounds so far and the question, of which LLaVA-1.5 has no form of its own.

    The request for a short answer is the one that it puts to all such questions.
    """
    lines = [f"{dialogue['caption'].strip()}."]
    for turn in dialogue["dialog"][: number - 1]:
        question, answer = (
            content["questions"][turn["question"]],
            content["answers"][turn["answer"]],
        )
        lines.append(f"Question: {question}? Answer: {answer}.")
    question = content["questions"][dialogue["dialog"][number - 1]["question"]]
    return "\n".join([*lines, f"Question: {question}?", SHORT_ANSWER_PROMPT])
