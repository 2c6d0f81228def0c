"""Annotation files: LLaVA's, COCO's, Karpathy's and VQA v2's JSON, and rows of other formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastvlm.data.conversations import BrokenRecordError, Conversation, Records
from fastvlm.data.image_folders import ImageFolders, folders_beside, split_in
from fastvlm.data.turns import CONTENT_KEYS, conversation_of, is_known
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import parse_json, read_json, read_text, reads

ANNOTATION_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
"""Suffixes of annotation files."""
MAX_INSPECTED_ROWS = 100
"""The number of rows from which a list's layout is recognised, as the first may be broken."""


@reads("These annotations")
def read_annotations(file: Path, images: Path | None, split: str) -> Records:
    """Read an annotation file in any supported layout.

    Args:
        file: The file; of VQA v2 its questions or its annotations, with the other beside it.
        images: The folder of its images; None to look for them around the file.
        split: The split to read from a file of Karpathy's; other layouts have a file for each.

    Raises:
        InputError: The file can't be read, its layout is not supported, or it is empty.
    """
    content, folders = load_json(file), folders_beside(file, images)
    match content:
        case list() if any(map(is_known, content[:MAX_INSPECTED_ROWS])):
            return records_of(content, folders, file.name)
        case {"images": list(rows), "annotations": [{"caption": _}, *_] as captions}:
            return _coco(rows, captions, folders)
        case {"images": [{"sentences": _}, *_] as rows}:
            return _karpathy(file, rows, folders, split)
        case {"questions": [{"question_id": _}, *_]}:
            return _vqa(file, annotations_of(file), folders)
        case {"annotations": [{"question_id": _}, *_]}:
            return _vqa(questions_of(file), file, folders)
        case Mapping() if content and all(isinstance(texts, list) for texts in content.values()):
            pairs = [(name, text) for name, texts in content.items() for text in texts]
            return captioned(pairs, folders)
    raise InputError(
        f"{file} has none of the layouts that fastvlm knows: a list of objects with one of"
        f" {', '.join(CONTENT_KEYS)} (LLaVA's and alike), COCO's images and annotations, VQA v2's"
        " questions or annotations, Karpathy's images with sentences, or lists of captions by"
        " image."
    )


def load_json(file: Path) -> Any:
    """Return the contents of a JSON file; for JSON lines a list, with broken lines as text.

    Raises:
        InputError: It can't be read, or isn't JSON.
    """
    if ".jsonl" not in file.suffixes:
        return read_json(file)
    return [_line(line) for line in read_text(file).split("\n") if line.strip()]


def _line(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return line


def records_of(rows: list[Any], folders: ImageFolders, source: str) -> Records:
    """Return the records of rows in a supported format, named by id or by number.

    Args:
        rows: The rows.
        folders: Where to look for images.
        source: The name of the data set, used in record names.
    """

    def convert(name: str, row: Any) -> Conversation:
        return conversation_of(name, row, folders)

    return Records(rows, convert, named_by("id", f"record of {source}"))


def named_by(key: str, kind: str) -> Callable[[int, Any], str]:
    """Return a function that names a row by its kind and id, or by its number if it has no id."""

    def name(index: int, row: Any) -> str:
        own = row.get(key) if isinstance(row, Mapping) else None
        return f"{kind} at {index}" if own is None else f"{kind} {own}"

    return name


def captioned(pairs: list[tuple[str, Any]], folders: ImageFolders) -> Records:
    """Return the records of pairs of an image's file name and a caption, named by the files."""

    def convert(name: str, pair: tuple[str, Any]) -> Conversation:
        return conversation_of(name, {"image": pair[0], "caption": pair[1]}, folders)

    return Records(pairs, convert, lambda _, pair: pair[0])


def _coco(images: list[Any], captions: list[Any], folders: ImageFolders) -> Records:
    files = {image.get("id"): image.get("file_name") for image in images}

    def convert(name: str, row: Any) -> Conversation:
        if (file := files.get(row["image_id"])) is None:
            raise BrokenRecordError(f"missing image: no image has the id {row['image_id']}")
        return conversation_of(name, {"image": file, "caption": row["caption"]}, folders)

    return Records(captions, convert, named_by("id", "caption"))


def _karpathy(file: Path, images: list[Any], folders: ImageFolders, split: str) -> Records:
    # What was left of COCO's validation images is trained on too, by everyone.
    splits = ("train", "restval") if split == "train" else (split,)
    pairs = [
        (str(Path(image.get("filepath", ""), image["filename"])), sentence.get("raw"))
        for image in images
        if image.get("split") in splits
        for sentence in image["sentences"]
    ]
    if not pairs:
        found = sorted({str(image.get("split")) for image in images})
        raise InputError(f"{file} has no split {split}; it has {', '.join(found)}.")
    return captioned(pairs, folders)


def annotations_of(questions: Path) -> Path:
    """Return the path of the annotations that belong to VQA v2's questions."""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    return questions.with_name(name)


def questions_of(annotations: Path) -> Path:
    """Return the path of the questions that belong to VQA v2's annotations.

    Raises:
        InputError: They are not beside the annotations.
    """
    for file in sorted(annotations.parent.glob("*questions*")):
        if annotations_of(file) == annotations:
            return file
    raise InputError(f"The questions that {annotations.name} answers are not beside it.")


def _vqa(questions: Path, annotations: Path, folders: ImageFolders) -> Records:
    if not annotations.is_file():
        raise InputError(f"The answers to {questions.name} are missing: {annotations}.")
    asked = load_json(questions)
    answers = {
        row.get("question_id"): row.get("answers") for row in load_json(annotations)["annotations"]
    }
    split = asked.get("data_subtype") or split_in(questions.name)

    def convert(name: str, row: Any) -> Conversation:
        if answers.get(row["question_id"]) is None:
            raise BrokenRecordError("no reply: it has no annotation")
        file = f"{row['image_id']:012d}.jpg"
        image = folders.find(*([f"COCO_{split}_{file}"] if split else []), file)
        found = {"image": image, "answers": answers[row["question_id"]]}
        return conversation_of(name, {**row, **found}, folders)

    return Records(asked["questions"], convert, named_by("question_id", "question"))
