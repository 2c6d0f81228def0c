"""Images to ask about, each with the fields of its row, in parts that any process can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from fastvlm.data.conversations import Broken, BrokenRecordError
from fastvlm.data.extras import needed
from fastvlm.data.hub import open_saved, open_stream
from fastvlm.data.image_folders import ImageFolders
from fastvlm.data.shards import Members, images_of, read_members
from fastvlm.functional.errors import InputError, first_line
from fastvlm.functional.text_files import parse_json
from fastvlm.vision.loading import ImageInput

IMAGE_COLUMNS = ("image", "file_name", "image_path", "img", "path", "jpg")
"""Columns that may hold the image, or name its file; the first one in a row does."""
TEXT_ENDINGS = ("txt", "caption", "text", "cls")
"""Members of a shard's records that are texts."""
PARQUET_BATCH_ROWS = 32
"""Rows of a parquet file that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image, not decoded yet, and what is known of it.

    Args:
        name: The image's name in the source.
        image: The image.
        fields: The other fields of its row.
    """

    name: str
    image: ImageInput
    fields: Mapping[str, Any]


class ImagePart(Protocol):
    """A part of a source: it holds names and places, but no images, and can be pickled."""

    @property
    def count(self) -> int | None:
        """The number of its records, where that is known before they are read."""
        ...

    def read(self) -> Iterator[ImageRecord | Broken]:
        """Yield its records in order; broken ones in their places.

        Raises:
            InputError: It can't be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class ListedImages:
    """Consecutive lines of a list of images.

    Args:
        file: The list: a path a line, or in JSON lines (`.jsonl`) an object that names the image.
        folder: Where the images lie.
        offset: The place of the part's first line in the file, in bytes.
        first: The number of its first record.
        count: The number of its records; empty lines are none.
    """

    file: Path
    folder: Path
    offset: int
    first: int
    count: int

    def read(self) -> Iterator[ImageRecord | Broken]:
        """Yield the records. See `ImagePart`."""
        folders = ImageFolders([self.folder])
        try:
            with self.file.open("rb") as lines:
                lines.seek(self.offset)
                whole = (line for line in lines if line.strip())
                for number, line in enumerate(islice(whole, self.count), self.first):
                    yield self._record(number, line, folders)
        except OSError as error:
            raise InputError(f"{self.file} can't be read: {first_line(error)}.") from error

    def _record(self, number: int, line: bytes, folders: ImageFolders) -> ImageRecord | Broken:
        name = f"record {number} of {self.file.name}"
        try:
            text = line.decode("utf-8-sig").strip()
            row = parse_json(text) if self.file.suffix == ".jsonl" else {"image": text}
        except ValueError as error:
            return Broken(name, f"malformed record: {first_line(error)}")
        return record_of(name, row, folders)


@dataclass(frozen=True, slots=True)
class TarImages:
    """A shard in WebDataset's layout: a record is an image, and perhaps a `.json` and texts.

    Args:
        file: Its path or URL.
    """

    file: str
    count: None = None

    def read(self) -> Iterator[ImageRecord | Broken]:
        """Yield the records. See `ImagePart`."""
        for key, members in read_members(self.file):
            if isinstance(members, Broken):
                yield members
            else:
                yield _record_of_members(key, members)


@dataclass(frozen=True, slots=True)
class ParquetImages:
    """A row group of a parquet file.

    Args:
        file: The file.
        group: The number of the row group.
        first: The number of its first row in the file.
        count: The number of its rows.
    """

    file: Path
    group: int
    first: int
    count: int

    def read(self) -> Iterator[ImageRecord | Broken]:
        """Yield the records. See `ImagePart`."""
        parquet = needed("pyarrow.parquet")
        folders = ImageFolders([self.file.parent])
        number = self.first
        try:
            with parquet.ParquetFile(self.file) as file:
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[self.group]):
                    for row in batch.to_pylist():
                        yield record_of(f"row {number} of {self.file.name}", row, folders)
                        number += 1
        except (OSError, ValueError) as error:  # (pyarrow's own are of these kinds)
            raise InputError(f"{self.file} can't be read: {first_line(error)}.") from error


@dataclass(frozen=True, slots=True)
class SavedImages:
    """Rows of a folder that `save_to_disk` of Hugging Face's `datasets` wrote.

    Args:
        folder: The folder.
        split: The split, if it has several.
        first: The number of the first row.
        count: The number of rows.
    """

    folder: Path
    split: str
    first: int
    count: int

    def read(self) -> Iterator[ImageRecord | Broken]:
        """Yield the records. See `ImagePart`."""
        dataset = open_saved(self.folder, self.split)
        folders = ImageFolders([self.folder.parent])
        for number in range(self.first, self.first + self.count):
            yield record_of(f"row {number} of {self.folder.name}", dataset[number], folders)


@dataclass(frozen=True, slots=True)
class StreamedImages:
    """A shard of a data set that is streamed from the hub.

    Args:
        name: `owner/name`, or `owner/name:configuration`.
        split: The split.
        shard: The number of the shard.
    """

    name: str
    split: str
    shard: int
    count: None = None

    def read(self) -> Iterator[ImageRecord | Broken]:
        """Yield the records. See `ImagePart`."""
        dataset = open_stream(self.name, self.split)
        part = dataset.shard(num_shards=int(dataset.num_shards), index=self.shard)
        try:
            for number, row in enumerate(part):
                name = f"row {number} of shard {self.shard} of {self.name}"
                yield record_of(name, row, ImageFolders([]))
        except OSError as error:
            raise InputError(f"{self.name} can't be streamed: {first_line(error)}.") from error


def record_of(name: str, row: Any, folders: ImageFolders) -> ImageRecord | Broken:
    """Return the record of a row; a broken one, if there is no image in it.

    Args:
        name: Its name, where the image has none of its own.
        row: The row.
        folders: Where to look for images that are named by their files.
    """
    if not isinstance(row, Mapping):
        return Broken(name, "malformed record: it is no object")
    column = next((one for one in IMAGE_COLUMNS if row.get(one) is not None), None)
    if column is None:
        return Broken(name, f"missing image: none of {', '.join(IMAGE_COLUMNS)} in it")
    value = row[column]
    path = value.get("path") if isinstance(value, Mapping) else value
    name = path if isinstance(path, str) and path else name
    fields = {field: held for field, held in row.items() if field != column}
    try:
        return ImageRecord(name, folders.image(value), fields)
    except BrokenRecordError as error:
        return Broken(name, str(error))


def _record_of_members(key: str, members: Members) -> ImageRecord | Broken:
    """Return the record of a shard's members: its image, its json's fields, its texts by ending."""
    images = images_of(members)
    if len(images) != 1:
        return Broken(key, f"missing image: a record has one, and this has {len(images)}")
    fields: dict[str, Any] = {}
    for ending, data in members:
        if ending == "json":
            try:
                row = parse_json(data)
            except ValueError as error:
                return Broken(key, f"malformed json: {first_line(error)}")
            fields |= row if isinstance(row, Mapping) else {}
        elif ending in TEXT_ENDINGS:
            fields[ending] = data.decode(errors="replace")
    return record_of(key, {**fields, "image": images[0]}, ImageFolders([]))
