"""Reading a data set in any supported layout, which is recognised from its files."""

from __future__ import annotations

import re
from pathlib import Path

from fastvlm.data import folders, hub, shards
from fastvlm.data.annotations import ANNOTATION_SUFFIXES, annotations_of, read_annotations
from fastvlm.data.conversations import Records, Shards
from fastvlm.data.questions import IMAGE_SUFFIXES
from fastvlm.functional.errors import InputError


def read_conversations(
    source: str | Path, *, images: Path | None = None, split: str = "train"
) -> Records | Shards:
    """Return the conversations of a data set in any supported layout.

    Args:
        source: An annotation file (LLaVA's, COCO's, Karpathy's or VQA v2's JSON, or JSON lines); a
            folder of images with captions (Flickr8k's, with a table, or with a `.txt` beside each
            image), with one annotation file, with shards, or written by `datasets`; a pattern or
            URL of shards (`part-{000..127}.tar`, `hf://datasets/owner/name/*.tar`); or the name
            of a data set on the hub (`owner/name`, `owner/name:configuration`), which is streamed.
        images: The folder of the images; None for where the layout has it.
        split: The split to read, if the source has several.

    Returns:
        `Records` with random access, or `Shards` that are streamed.

    Raises:
        InputError: There is nothing at the source, its layout is not supported, or it is broken.
    """
    name, path = str(source), Path(source)
    if images is not None and not images.is_dir():
        raise InputError(f"There is no folder of images at {images}.")
    if name.endswith(shards.SHARD_SUFFIXES):
        return shards.find_shards(name)
    if path.is_dir():
        return _read_folder(path, images, split)
    if path.is_file():
        if path.name in folders.TABLE_FILE_NAMES or path.suffix == ".csv":
            return folders.read_table(path, images)
        return read_annotations(path, images, split)
    # A name of the hub's has one slash; what ends like a file was meant as one.
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name) and not name.endswith(
        ANNOTATION_SUFFIXES
    ):
        return hub.stream_from_hub(name, images, split)
    raise InputError(f"There is no data set at {name}: no such file, folder or shards.")


def _read_folder(folder: Path, images: Path | None, split: str) -> Records | Shards:
    if any((folder / name).is_file() for name in hub.SAVED_DATASET_FILE_NAMES):
        return hub.read_saved(folder, images, split)
    if (folder / "captions.tsv").is_file():
        return folders.read_flickr8k_captions(folder, split)
    for name in folders.TABLE_FILE_NAMES:
        if (folder / name).is_file():
            return folders.read_table(folder / name, images)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if found := [name for name in names if name.endswith(shards.SHARD_SUFFIXES)]:
        return shards.TarShards(tuple(str(folder / name) for name in found))
    files = [folder / name for name in names if name.endswith(ANNOTATION_SUFFIXES)]
    # VQA v2's answers belong to their questions.
    answers = {annotations_of(file) for file in files if "questions" in file.name}
    files = [file for file in files if file not in answers]
    if len(files) == 1:
        return read_annotations(files[0], images, split)
    if files:
        listed = ", ".join(file.name for file in files)
        raise InputError(f"{folder} has several annotation files; give one of {listed}.")
    if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names) and any(
        name.endswith(".txt") for name in names
    ):
        return folders.read_captions_beside(folder)
    raise InputError(
        f"No data set is recognised in {folder}: it has no captions.tsv,"
        f" {', '.join(folders.TABLE_FILE_NAMES)}, shards (*.tar), annotation file (*.json,"
        " *.jsonl), folder saved by datasets, or images with a .txt beside each."
    )
