"""Finding and opening the images of a data set: in folders, in bytes, or already open."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlm.data.conversations import BrokenRecordError
from fastvlm.functional.errors import first_line
from fastvlm.vision.loading import ImageInput


class ImageFolders:
    """The folders of a data set's images.

    Args:
        folders: The folders, in order of preference; those that don't exist are ignored.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]

    def find(self, *names: str) -> Path:
        """Return the first file with one of these names.

        Raises:
            BrokenRecordError: There is none.
        """
        for folder in self.folders:
            for name in names:
                # A name may be anything that a file held, and the system refuses some: too long.
                try:
                    if (path := folder / name).is_file():
                        return path
                except (OSError, ValueError):
                    continue
        raise BrokenRecordError(f"missing image: {' or '.join(names)}")

    def image(self, value: Any) -> ImageInput:
        """Return an image given by a data set as a file name, bytes or a Pillow image.

        Raises:
            BrokenRecordError: The file is missing, the bytes are no image, or it's none of these.
        """
        match value:
            case str() if value:
                return self.find(value)
            case Path() | Image.Image():
                return value
            case bytes():
                return image_of_bytes(value)
            # What Hugging Face's datasets make of an image that they don't decode.
            case {"bytes": bytes(data)}:
                return image_of_bytes(data)
            case {"path": str(name)}:
                return self.find(name)
        raise BrokenRecordError(f"missing image: {_kind(value)} stands in its place")


def image_of_bytes(data: bytes) -> Image.Image:
    """Open an encoded image, reading its header only; pixels are decoded when they are used.

    Raises:
        BrokenRecordError: It is no image, or far too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:
        raise BrokenRecordError(f"unreadable image: {first_line(error)}") from error


def folders_beside(file: Path, images: Path | None) -> ImageFolders:
    """Return the folders in which to look for the images of an annotation file.

    Args:
        file: The file; the names of COCO's include the folder of their images (`train2017`), which
            lies beside the file's own folder.
        images: The folder that the user gave, which is then the only one; None to guess.
    """
    if images is not None:
        return ImageFolders([images])
    near = [file.parent, file.parent / "images", file.parent.parent, file.parent.parent / "images"]
    split = split_in(file.name)
    return ImageFolders([*([folder / split for folder in near] if split else []), *near])


def split_in(name: str) -> str | None:
    """Return the COCO split in a file's name, as its image folder is called; None for none."""
    found = re.search(r"(train|val|test)20\d\d", name)
    return found[0] if found else None


def _kind(value: Any) -> str:
    return f"an object of {', '.join(value)}" if isinstance(value, Mapping) else repr(value)[:40]
