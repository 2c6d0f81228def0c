"""The distinct images of data sets, and the random crops that an encoder learns from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastvlm.data.broken import BrokenRecords
from fastvlm.data.conversations import Broken, Conversation, Record, Records, Shards
from fastvlm.data.questions import IMAGE_SUFFIXES, images_in
from fastvlm.functional.errors import InputError
from fastvlm.vision.images import pad_to_square, to_tensor
from fastvlm.vision.loading import ImageInput, load_image

MAX_ASPECT_RATIO = 4 / 3
"""The largest ratio of a crop's sides, each as a share of the image's."""
GAIN = (0.7, 1.3)
"""The least and greatest factor of a crop's brightness, and of its contrast."""
MIRRORED_SHARE = 0.5
TINT = (0.9, 1.1)
"""The least and greatest factor of each of a crop's colours."""


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image of a data set, which is opened when it is needed.

    Args:
        records: The data set's records.
        record: The number of the record that shows the image.
        place: Its place among the record's images.
    """

    records: Sequence[Record]
    record: int
    place: int

    def image(self) -> ImageInput:
        """Return the image as the data set has it; a file is not opened.

        Raises:
            InputError: The record can't be read any more.
        """
        record = self.records[self.record]
        if isinstance(record, Broken):
            raise InputError(f"{record.name} can't be read any more: {record.reason}.")
        return _images_of(record)[self.place]


def distinct_images(
    records: Sequence[Record], broken: BrokenRecords, limit: int | None = None
) -> list[ImageReference]:
    """Return the images that records show; a file that is shown several times is one image.

    Args:
        records: The records.
        broken: What counts the records that are passed over.
        limit: The most images.

    Raises:
        InputError: Too many records are broken.
    """
    found: list[ImageReference] = []
    files: set[str] = set()
    for number, record in enumerate(records):
        if limit is not None and len(found) >= limit:
            break
        broken.see()
        if isinstance(record, Broken):
            broken.add(record)
            continue
        for place, image in enumerate(_images_of(record)):
            if isinstance(image, str | Path):
                if str(image) in files:
                    continue
                files.add(str(image))
            found.append(ImageReference(records, number, place))
    broken.check()
    return found[:limit]


def streamed_records(source: Shards, limit: int) -> list[Record]:
    """Return the first records of shards, with their images still encoded."""
    stream: Iterable[Record] = (
        record for shard in range(len(source)) for record in source.read(shard, 0)
    )
    return list(islice(stream, limit))


def is_image_folder(source: str) -> bool:
    """Say whether a folder holds images and no other file, so that it has no captions either."""
    folder = Path(source)
    if not folder.is_dir():
        return False
    files = [path for path in folder.iterdir() if path.is_file()]
    return bool(files) and all(path.suffix.lower() in IMAGE_SUFFIXES for path in files)


def read_image_folder(folder: Path) -> Records:
    """Return a record for each image of a folder, without any text.

    Raises:
        InputError: There is no image.
    """

    def convert(name: str, path: Path) -> Conversation:
        return Conversation(
            name, ({"role": "user", "content": [{"type": "image", "image": path}]},)
        )

    return Records(images_in(folder), convert, lambda _, path: path.name)


def whole_image(image: ImageInput, size: int) -> Tensor:
    """Return an image as the encoder is shown it, padded to a square: (3, size, size) in [0, 1].

    Raises:
        InputError: It can't be opened.
    """
    square = pad_to_square(load_image(image))
    return to_tensor(square.resize((size, size), Image.Resampling.BICUBIC))


@dataclass(frozen=True, slots=True)
class CropMaker:
    """Makes random crops of images; it can be pickled, for the processes that prepare data.

    A crop is stretched to a square, mirrored half of the time, and recoloured a little.

    Args:
        size: The side of a crop in pixels.
        smallest: The least share of each of an image's sides that a crop shows.
    """

    size: int
    smallest: float

    def __call__(self, wanted: tuple[str, ImageInput]) -> Tensor:
        """Return a crop, drawn by its seed: (3, size, size), uint8.

        Args:
            wanted: The seed and the image.

        Raises:
            InputError: The image can't be opened.
        """
        seed, given = wanted
        draw = random.Random(seed)
        image = load_image(given)
        across = draw.uniform(self.smallest, 1.0)
        ratio = draw.uniform(1 / MAX_ASPECT_RATIO, MAX_ASPECT_RATIO)
        down = min(1.0, max(self.smallest, across * ratio))
        width, height = across * image.width, down * image.height
        left = draw.uniform(0.0, image.width - width)
        top = draw.uniform(0.0, image.height - height)
        crop = image.resize(
            (self.size, self.size),
            Image.Resampling.BILINEAR,
            box=(left, top, left + width, top + height),
        )
        pixels = to_tensor(crop)
        if draw.random() < MIRRORED_SHARE:
            pixels = pixels.flip(2)
        mean, contrast = pixels.mean(), draw.uniform(*GAIN)
        gain = draw.uniform(*GAIN) * torch.tensor([[[draw.uniform(*TINT)]] for _ in range(3)])
        return (255 * ((pixels - mean) * contrast + mean) * gain).round().clamp(0, 255).byte()


def _images_of(record: Conversation) -> list[Any]:
    return [
        part["image"]
        for message in record.messages
        for part in message["content"]
        if part["type"] == "image"
    ]
