"""Data sets of Hugging Face's `datasets`: saved in a folder, or streamed from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.data.conversations import Conversation, Record, Records, converted
from fastvlm.data.extras import needed
from fastvlm.data.image_folders import ImageFolders
from fastvlm.data.turns import CONTENT_KEYS, conversation_of
from fastvlm.functional.errors import InputError, first_line

SAVED_DATASET_FILE_NAMES = ("dataset_dict.json", "state.json")
"""Files written by `save_to_disk`: for several splits, for one."""


@dataclass(frozen=True, slots=True)
class HubShards:
    """The shards of a streamed data set.

    Args:
        dataset: A `datasets.IterableDataset`.
        name: The data set's name.
        folders: Where to look for images that rows give by file name.
    """

    dataset: Any
    name: str
    folders: ImageFolders

    def __len__(self) -> int:
        return int(self.dataset.num_shards)

    def read(self, shard: int, start: int) -> Iterator[Record]:
        """Yield a shard's records from number `start` on.

        Raises:
            InputError: The hub can't be reached.
        """
        part = self.dataset.shard(num_shards=len(self), index=shard).skip(start)
        try:
            for number, row in enumerate(part, start):
                yield _record(f"row {number} of shard {shard} of {self.name}", row, self.folders)
        except OSError as error:
            raise InputError(f"{self.name} can't be streamed: {first_line(error)}.") from error


def read_saved(folder: Path, images: Path | None, split: str) -> Records:
    """Read a folder that `save_to_disk` wrote.

    Args:
        folder: The folder.
        images: Where to look for images that rows give by file name; None for the folder's
            parent.
        split: The split to read, if the folder has several.

    Raises:
        InputError: `datasets` is not installed, there is no such split, or no column is supported.
    """
    dataset = open_saved(folder, split)
    _check_columns(dataset, str(folder))
    folders = ImageFolders([folder.parent if images is None else images])

    def convert(name: str, row: Any) -> Conversation:
        return conversation_of(name, row, folders)

    return Records(dataset, convert, lambda number, _: f"row {number} of {folder.name}")


def stream_from_hub(name: str, images: Path | None, split: str) -> HubShards:
    """Stream a data set from the hub.

    Args:
        name: `owner/name`, or `owner/name:configuration`.
        images: Where to look for images that rows give by file name.
        split: The split to read.

    Raises:
        InputError: `datasets` is not installed, the hub has no such data set or can't be reached,
            or no column is supported.
    """
    dataset = open_stream(name, split)
    _check_columns(dataset, name)
    folders = ImageFolders([] if images is None else [images])
    return HubShards(dataset, name, folders)


def _record(name: str, row: Any, folders: ImageFolders) -> Record:
    return converted(name, row, lambda name, row: conversation_of(name, row, folders))


def open_saved(folder: Path, split: str) -> Any:
    """Return a data set that `save_to_disk` wrote, which hands images out as they are encoded.

    Args:
        folder: The folder.
        split: The split, if the folder has several.

    Raises:
        InputError: `datasets` is not installed, or there is no such split.
    """
    library = needed("datasets")
    dataset = library.load_from_disk(str(folder))
    if isinstance(dataset, library.DatasetDict):
        if split not in dataset:
            raise InputError(f"{folder} has no split {split}; it has {', '.join(dataset)}.")
        dataset = dataset[split]
    return _undecoded(dataset)


def open_stream(name: str, split: str) -> Any:
    """Return a data set of the hub that is streamed, and hands images out as they are encoded.

    Args:
        name: `owner/name`, or `owner/name:configuration`.
        split: The split.

    Raises:
        InputError: `datasets` is not installed, or the hub has no such data set or can't be
            reached.
    """
    library = needed("datasets")
    path, _, configuration = name.partition(":")
    try:
        dataset = library.load_dataset(path, configuration or None, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"There is no file or folder {name}, and it can't be streamed from the hub:"
            f" {first_line(error)}."
        ) from error
    return _undecoded(dataset)


def _check_columns(dataset: Any, name: str) -> None:
    """Refuse a data set none of whose columns is known.

    Raises:
        InputError: None is.
    """
    columns = dataset.column_names
    if columns is not None and not set(columns) & set(CONTENT_KEYS):
        raise InputError(
            f"{name} has the columns {', '.join(columns)}; fastvlm looks for one of"
            f" {', '.join(CONTENT_KEYS)}."
        )


def _undecoded(dataset: Any) -> Any:
    """Return a data set that hands images out as they are encoded, so that we see broken ones."""
    if dataset.features is None:
        return dataset
    features = {column: _encoded(feature) for column, feature in dataset.features.items()}
    return dataset.cast(needed("datasets").Features(features))


def _encoded(feature: Any) -> Any:
    library = needed("datasets")
    match feature:
        case library.Image():
            return library.Image(decode=False)
        case library.List():
            return library.List(_encoded(feature.feature))
        case dict():
            return {name: _encoded(inner) for name, inner in feature.items()}
    return feature
