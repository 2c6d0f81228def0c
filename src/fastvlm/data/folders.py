"""Folders of images with captions: Flickr8k's, with a table, or a text beside each image."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from fastvlm.data.annotations import captioned, load_json, records_of
from fastvlm.data.captioned import flickr8k_split
from fastvlm.data.conversations import BrokenRecordError, Conversation, Records
from fastvlm.data.image_folders import ImageFolders
from fastvlm.data.questions import images_in
from fastvlm.data.turns import conversation_of
from fastvlm.functional.errors import InputError

TABLE_FILE_NAMES = ("metadata.jsonl", "metadata.csv", "captions.csv", "captions.txt")
"""Tables of images: Hugging Face's image folders have the first two, Flickr8k the last."""
IMAGE_COLUMNS = ("file_name", "image")
"""Columns that may name the image."""


def read_flickr8k_captions(folder: Path, split: str) -> Records:
    """Return a record for each caption of a split of a folder in Flickr8k's layout.

    Raises:
        InputError: A file is missing.
    """
    pairs = [
        (photo.path.name, caption)
        for photo in flickr8k_split(folder, split)
        # One without captions is a record all the same: a broken one.
        for caption in photo.captions or (None,)
    ]
    return captioned(pairs, ImageFolders([folder / "images"]))


def read_table(table: Path, images: Path | None) -> Records:
    """Read a table whose rows name an image and otherwise have a supported format.

    Args:
        table: JSON lines, or comma-separated values with a header.
        images: The folder of the images; None for the table's folder and its `images`.

    Raises:
        InputError: The table has another format, or no column names the images.
    """
    rows: list[Any]
    if table.suffix == ".jsonl":
        rows = load_json(table)
    else:
        try:
            with table.open(encoding="utf-8-sig", newline="") as lines:
                rows = list(csv.DictReader(lines))
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{table} can't be read as a table: {error}.") from error
    columns = next((row for row in rows if isinstance(row, dict)), {})
    column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if column is None:
        raise InputError(
            f"The rows of {table} name no image: there is no column {' or '.join(IMAGE_COLUMNS)}."
        )
    named = [{**row, "image": row.get(column)} if isinstance(row, dict) else row for row in rows]
    near = [table.parent, table.parent / "images", table.parent / "Images"]
    folders = ImageFolders(near if images is None else [images])
    return records_of(named, folders, table.name)


def read_captions_beside(folder: Path) -> Records:
    """Return a record for each image of a folder with a caption in a `.txt` of the same name.

    Raises:
        InputError: There is no image.
    """

    def convert(name: str, path: Path) -> Conversation:
        try:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BrokenRecordError(f"no reply: {path.stem}.txt can't be read") from error
        return conversation_of(name, {"image": path, "caption": caption}, ImageFolders([]))

    return Records(images_in(folder), convert, lambda _, path: path.name)
