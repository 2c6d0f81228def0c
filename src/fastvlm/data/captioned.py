"""Photos with several human captions each, in Flickr8k's layout."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_text


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """A photo's file and its human captions."""

    path: Path
    captions: tuple[str, ...]


def tidy(caption: str) -> str:
    """Return a caption with a capital first letter and no space before its final period."""
    words = caption.replace('"', " ").split()
    while words and words[-1] in {".", ",", "!"}:
        words.pop()
    text = " ".join(words).replace(" ,", ",").replace(" 's", "'s").replace(" .", ".").rstrip(".")
    return text[:1].upper() + text[1:] + "." if text else ""


def read_flickr8k(folder: Path, split: str) -> list[CaptionedImage]:
    """Read a split of a folder with `captions.tsv`, `<split>.txt` and `images/`.

    Raises:
        InputError: A file is missing, or a photo of the split has no caption.
    """
    photos = flickr8k_split(folder, split)
    for photo in photos:
        if not photo.captions:
            raise InputError(
                f"{photo.path.name}, listed in {split}.txt, has no caption in captions.tsv."
            )
    return photos


def flickr8k_split(folder: Path, split: str) -> list[CaptionedImage]:
    """Read a split like `read_flickr8k`, but include photos without captions.

    Raises:
        InputError: A file is missing.
    """
    listing, table = folder / f"{split}.txt", folder / "captions.tsv"
    for file in (listing, table):
        if not file.is_file():
            raise InputError(f"{folder} is not laid out like Flickr8k: {file.name} is missing.")
    captions: dict[str, list[str]] = {}
    for line in read_text(table).splitlines():
        name, _, caption = line.partition("\t")
        if text := tidy(caption):
            captions.setdefault(name, []).append(text)
    return [
        CaptionedImage(folder / "images" / name, tuple(captions.get(name, ())))
        for name in read_text(listing).split()
    ]


def words_of(text: str) -> set[str]:
    """Return the distinct lower-case words of a text."""
    return set(re.findall(r"[a-z]+", text.lower()))


def typical_first(photos: Sequence[CaptionedImage]) -> list[CaptionedImage]:
    """Return the photos with their captions ordered by typicality, the most typical first.

    A caption's typicality is the sum of its cosine similarities with the photo's other captions,
    with words weighted by their rarity among photos (CIDEr's consensus with single words, Vedantam
    et al. 2015, section 4).
    """
    words = [[words_of(caption) for caption in shown.captions] for shown in photos]
    frequency: Counter[str] = Counter()
    for captions in words:
        frequency.update(set().union(*captions))
    rarity = {word: math.log(len(photos) / count) for word, count in frequency.items()}
    ordered = []
    for photo, captions in zip(photos, words, strict=True):
        norms = [math.sqrt(sum(rarity[word] ** 2 for word in said)) or 1.0 for said in captions]
        typicality = [
            sum(
                sum(rarity[word] ** 2 for word in said & other) / (norms[row] * norms[column])
                for column, other in enumerate(captions)
                if column != row
            )
            for row, said in enumerate(captions)
        ]
        order = sorted(range(len(captions)), key=lambda row: -typicality[row])
        captions_ordered = tuple(photo.captions[row] for row in order)
        ordered.append(replace(photo, captions=captions_ordered))
    return ordered


def decode(photos: Sequence[CaptionedImage], size: int) -> Tensor:
    """Return all photos as one uint8 tensor (photos, 3, size, size), stretched."""
    pixels = torch.empty(len(photos), 3, size, size, dtype=torch.uint8)
    for index, photo in enumerate(photos):
        with Image.open(photo.path) as file:
            image = file.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels[index] = flat.view(size, size, 3).permute(2, 0, 1)
    return pixels
