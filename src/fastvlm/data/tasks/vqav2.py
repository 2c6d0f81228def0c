"""VQA v2: questions about COCO's images, each answered by ten people (Goyal et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastvlm.data.tasks.answering import Answering
from fastvlm.data.tasks.files import find, locate
from fastvlm.data.tasks.task import SHORT_ANSWER_PROMPT, Item
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_json, reads
from fastvlm.metrics.answers import normalize_submission, vqa_accuracy

QUESTIONS_FILE_NAME = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS_FILE_NAME = "v2_mscoco_val2014_annotations.json"


def submitted_accuracy(reply: str, answers: Sequence[str]) -> float:
    """Compute VQA accuracy of a reply in the form in which LLaVA-1.5's were submitted.

    The official evaluation leaves case and punctuation where people's answers are all alike, and
    a model that says "Yes." would be wrong there.
    """
    return vqa_accuracy(normalize_submission(reply), answers)


@reads("VQA v2's files")
def vqav2(folder: Path) -> Answering:
    """Read VQA v2's validation set, scored by VQA accuracy and by the type of answer.

    Args:
        folder: Holds the questions and the annotations, here or in `annotations/`, and COCO's
            images in `val2014/` or `images/`, named as in 2014 or as in 2017.

    Raises:
        InputError: A file or images are missing, or a question has no annotation.
    """
    questions = read_json(find(folder, QUESTIONS_FILE_NAME))["questions"]
    annotations = {
        annotation["question_id"]: annotation
        for annotation in read_json(find(folder, ANNOTATIONS_FILE_NAME))["annotations"]
    }
    unanswered = [question for question in questions if question["question_id"] not in annotations]
    if unanswered:
        raise InputError(
            f"{len(unanswered)} questions of {QUESTIONS_FILE_NAME} have no answers in"
            f" {ANNOTATIONS_FILE_NAME}, the first of them {unanswered[0]['question_id']}."
        )
    images = locate(
        folder,
        {
            str(question["image_id"]): [
                f"{place}/{prefix}{question['image_id']:012}.jpg"
                for place in ("val2014", "images")
                for prefix in ("COCO_val2014_", "")
            ]
            for question in questions
        },
    )
    items = tuple(
        Item(
            str(question["question_id"]),
            f"{question['question']}\n{SHORT_ANSWER_PROMPT}",
            images[str(question["image_id"])],
        )
        for question in questions
    )
    annotated = {str(q["question_id"]): annotations[q["question_id"]] for q in questions}
    return Answering(
        "VQA v2",
        items,
        "accuracy",
        submitted_accuracy,
        {key: [one["answer"] for one in its["answers"]] for key, its in annotated.items()},
        {key: its["answer_type"] for key, its in annotated.items()},
    )
