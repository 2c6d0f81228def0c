"""DocVQA: questions about scanned pages (Mathew et al. 2021, arXiv 2007.00398)."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from fastvlm.data.tasks.answering import Answering
from fastvlm.data.tasks.files import find, locate
from fastvlm.data.tasks.task import SHORT_ANSWER_PROMPT, Item
from fastvlm.functional.text_files import read_json, reads
from fastvlm.metrics.answers import anls


@reads("DocVQA's files")
def docvqa(folder: Path) -> Answering:
    """Read DocVQA's validation set, scored by ANLS.

    Args:
        folder: Holds `val_v1.0.json`, or `val_v1.0_withQT.json` of the later release, and the pages
            in `documents/` or `spdocvqa_images/`.

    Raises:
        InputError: The file or images are missing.
    """
    questions = read_json(find(folder, "val_v1.0.json", "val_v1.0_withQT.json"))["data"]
    images = locate(
        folder,
        {
            question["image"]: (
                question["image"],
                f"spdocvqa_images/{PurePosixPath(question['image']).name}",
            )
            for question in questions
        },
    )
    items = tuple(
        Item(
            str(question["questionId"]),
            f"{question['question']}\n{SHORT_ANSWER_PROMPT}",
            images[question["image"]],
        )
        for question in questions
    )
    answers = {str(question["questionId"]): question["answers"] for question in questions}
    return Answering("DocVQA", items, "ANLS", anls, answers)
