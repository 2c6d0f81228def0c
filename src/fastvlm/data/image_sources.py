"""Finding the images to ask about, in any supported layout, which is recognised from its files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.data.extras import needed
from fastvlm.data.hub import SAVED_DATASET_FILE_NAMES, open_saved, open_stream
from fastvlm.data.image_records import (
    ImagePart,
    ListedImages,
    ParquetImages,
    SavedImages,
    StreamedImages,
    TarImages,
)
from fastvlm.data.questions import IMAGE_SUFFIXES
from fastvlm.data.shards import SHARD_SUFFIXES, find_shards
from fastvlm.functional.errors import InputError, first_line
from fastvlm.functional.files import written_file

LIST_SUFFIXES = (".txt", ".jsonl")
"""Suffixes of lists of images."""
PARQUET_SUFFIX = ".parquet"


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Images in parts.

    Args:
        parts: The parts, in order.
        digest: Tells the source from others, and from another state of its own.
    """

    parts: Sequence[ImagePart]
    digest: str

    @property
    def count(self) -> int | None:
        """The number of records; None where it is not known before they are read."""
        counts = [part.count for part in self.parts]
        return None if None in counts else sum(one or 0 for one in counts)


def find_images(source: str, listing: Path, part_size: int, split: str = "train") -> ImageSource:
    """Return the images of a source in parts.

    Args:
        source: A folder of images, with folders in it; a list of images (`.txt`, `.jsonl`); shards
            or parquet files, as a folder, a file or a pattern; a folder that `datasets` saved; or
            the name of a data set on the hub.
        listing: Where the names of a folder's images are written, unless they are there already:
            the order and number of the images stay what they were when the work began.
        part_size: Records of a part, where the source has no parts of its own.
        split: The split of a data set.

    Raises:
        InputError: There is nothing at the source, or its layout is not supported.
        StorageError: The listing can't be written.
    """
    path = Path(source)
    if source.endswith(SHARD_SUFFIXES):
        return _shards(find_shards(source).files)
    if source.endswith(PARQUET_SUFFIX):
        return _parquet(_matches(source))
    if path.is_dir():
        return _in_folder(path, listing, part_size, split)
    if path.is_file():
        if path.suffix in LIST_SUFFIXES:
            return listed(path, path.absolute().parent, part_size)
        raise InputError(
            f"{path} is no list of images; that is a .txt with a path a line, or a .jsonl."
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", source):
        shards = int(open_stream(source, split).num_shards)
        parts = [StreamedImages(source, split, shard) for shard in range(shards)]
        return ImageSource(parts, _digest([source, split, shards]))
    raise InputError(f"There are no images at {source}: no such file, folder or shards.")


def _in_folder(folder: Path, listing: Path, part_size: int, split: str) -> ImageSource:
    if any((folder / name).is_file() for name in SAVED_DATASET_FILE_NAMES):
        rows = len(open_saved(folder, split))
        starts = range(0, rows, part_size)
        saved = [
            SavedImages(folder.absolute(), split, at, min(part_size, rows - at)) for at in starts
        ]
        return ImageSource(saved, _digest([split, rows]))
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if found := [str(folder / name) for name in names if name.endswith(SHARD_SUFFIXES)]:
        return _shards(found)
    if tables := [folder / name for name in names if name.endswith(PARQUET_SUFFIX)]:
        return _parquet(tables)
    if not listing.is_file():
        with written_file(listing) as beside, beside.open("w", encoding="utf-8") as lines:
            for name in _image_names(folder):
                lines.write(json.dumps({"image": name}) + "\n")
    return listed(listing, folder.absolute(), part_size)


def _image_names(folder: Path) -> list[str]:
    """Return the images below a folder, in the order of their names.

    Raises:
        InputError: There is none.
    """
    found = [
        os.path.relpath(os.path.join(place, name), folder)  # noqa: PTH118 (for a million of them)
        for place, names in _places(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122
    ]
    if not found:
        raise InputError(
            f"There is nothing to ask about in {folder}: no image, shard (*.tar), parquet file or"
            " data set saved by datasets."
        )
    return sorted(found)


def _places(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below one and its files' names; a link back up is not followed."""
    above = {str(folder): frozenset({os.path.realpath(folder)})}
    for place, inner, names in os.walk(folder, followlinks=True):
        known = above.pop(place)
        real = {name: os.path.realpath(f"{place}/{name}") for name in inner}
        inner[:] = [name for name in inner if real[name] not in known]
        above |= {os.path.join(place, name): known | {real[name]} for name in inner}  # noqa: PTH118
        yield place, names


def listed(file: Path, folder: Path, part_size: int) -> ImageSource:
    """Return the images of a list, of which places in the file are kept, and no names.

    Args:
        file: The list. See `ListedImages`.
        folder: Where images are looked for that the list doesn't name by whole paths.
        part_size: Records of a part.

    Raises:
        InputError: The list can't be read, or is empty.
    """
    parts: list[ListedImages] = []
    digest = hashlib.sha256()
    at, begun, count, first = 0, 0, 0, 0
    try:
        with file.open("rb") as lines:
            for line in lines:
                digest.update(line)
                if line.strip():
                    begun = at if not count else begun
                    count += 1
                at += len(line)
                if count == part_size:
                    parts.append(ListedImages(file.absolute(), folder, begun, first, count))
                    first, count = first + count, 0
    except OSError as error:
        raise InputError(f"{file} can't be read: {first_line(error)}.") from error
    if count:
        parts.append(ListedImages(file.absolute(), folder, begun, first, count))
    if not parts:
        raise InputError(f"There is no image in {file}.")
    return ImageSource(parts, digest.hexdigest())


def _shards(files: Sequence[str]) -> ImageSource:
    files = [file if "://" in file else os.path.abspath(file) for file in files]  # noqa: PTH100
    names = [file.rpartition("/")[2] for file in files]
    return ImageSource([TarImages(file) for file in files], _digest(names))


def _parquet(files: Sequence[Path]) -> ImageSource:
    parts = [part for file in files for part in _row_groups(file.absolute())]
    if not parts:
        raise InputError(f"There is no row in {files[0]}.")
    return ImageSource(parts, _digest([(part.file.name, part.group, part.count) for part in parts]))


def _row_groups(file: Path) -> Iterator[ParquetImages]:
    try:
        metadata = needed("pyarrow.parquet").read_metadata(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} can't be read: {first_line(error)}.") from error
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if rows:
            yield ParquetImages(file, group, first, rows)
        first += rows


def _matches(pattern: str) -> list[Path]:
    """Return the local files that match a pattern, in the order of their names."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    anchor = Path(pattern).anchor
    found = sorted(Path(anchor).glob(pattern[len(anchor) :]))
    if not found:
        raise InputError(f"There is no parquet file at {pattern}.")
    return found


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
