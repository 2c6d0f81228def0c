"""TextVQA: questions whose answers are to be read in the image (Singh et al. 2019)."""

from __future__ import annotations

from pathlib import Path

from fastvlm.data.tasks.answering import Answering
from fastvlm.data.tasks.files import find, locate
from fastvlm.data.tasks.task import SHORT_ANSWER_PROMPT, Item
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_json, read_json_lines, reads
from fastvlm.metrics.answers import textvqa_accuracy

ANNOTATIONS_FILE_NAME = "TextVQA_0.5.1_val.json"
OCR_FILE_NAME = "llava_textvqa_val_v051_ocr.jsonl"


@reads("TextVQA's files")
def textvqa(folder: Path, ocr: bool = False) -> Answering:
    """Read TextVQA's validation set, scored by TextVQA's accuracy.

    Args:
        folder: Holds `TextVQA_0.5.1_val.json` and the images in `train_images/` (where the
            publisher packs those of validation too) or `images/`.
        ocr: Ask with the words that an OCR system read in the image, as LLaVA-1.5's published
            figure does; they are in LLaVA's own `llava_textvqa_val_v051_ocr.jsonl`, to be put
            into the folder.

    Raises:
        InputError: A file or images are missing, or a question has no words of OCR.
    """
    questions = read_json(find(folder, ANNOTATIONS_FILE_NAME))["data"]
    prompts = {
        str(question["question_id"]): f"{question['question'].capitalize()}\n{SHORT_ANSWER_PROMPT}"
        for question in questions
    }
    if ocr:
        # LLaVA's file names questions by their image and their text alone.
        asked = {
            (line["question_id"], line["text"].split("\n")[0].lower()): line["text"]
            for line in read_json_lines(find(folder, OCR_FILE_NAME))
        }
        for question in questions:
            key = (question["image_id"], question["question"].lower())
            if key not in asked:
                raise InputError(
                    f"{OCR_FILE_NAME} has no question {question['question']!r} about"
                    f" {question['image_id']}."
                )
            prompts[str(question["question_id"])] = asked[key]
    images = locate(
        folder,
        {
            question["image_id"]: [
                f"{place}/{question['image_id']}.jpg" for place in ("train_images", "images")
            ]
            for question in questions
        },
    )
    items = tuple(
        Item(key, prompts[key], images[question["image_id"]])
        for question in questions
        for key in [str(question["question_id"])]
    )
    return Answering(
        "TextVQA with OCR" if ocr else "TextVQA",
        items,
        "accuracy",
        textvqa_accuracy,
        {str(question["question_id"]): question["answers"] for question in questions},
    )
