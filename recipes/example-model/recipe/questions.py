"""What a draft for the example model is asked: photos and scenes, in many words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from PIL import ImageOps
from PIL.Image import Image

from fastvlm.data.captioned import read_flickr8k, typical_first
from fastvlm.functional.files import storage_errors, write_json
from fastvlm.vision.loading import load_image
from fastvlm_example import HELD_OUT_SCENES
from fastvlm_example.scenes import render, sample
from recipe.conversations import about_photo, about_scene

SCENES = "scenes"
CROPS = "crops"
SMALLEST_CROP = 0.6
"""The least share of a photo's sides that a crop shows."""


def write_questions(
    photos: Path, output: Path, *, number: int, scenes: int, size: int, seed: int = 0
) -> None:
    """Write conversations about photos and scenes, for `fastvlm train draft --data output`.

    Args:
        photos: A folder in Flickr8k's layout.
        output: The folder of `conversations.json`, and of the images of scenes and crops.
        number: Conversations about photos.
        scenes: Conversations about scenes.
        size: Side of the scenes' images in pixels.
        seed: Decides the draws.

    Raises:
        InputError: The photos can't be read.
        StorageError: The folder can't be written.
    """
    random.seed(seed)
    with storage_errors(output):
        (output / SCENES).mkdir(parents=True, exist_ok=True)
        (output / CROPS).mkdir(exist_ok=True)
    rows = [*islice(photo_rows(photos, output), number)]
    for place in range(scenes):
        scene = sample(random.randrange(HELD_OUT_SCENES))
        file = output / SCENES / f"{place}.png"
        with storage_errors(output):
            render(scene, size).save(file)
        _, prompt, reply = about_scene(scene, 0.0)
        rows.append(row(f"{SCENES}/{file.name}", prompt, reply))
    write_json(output / "conversations.json", rows)


def photo_rows(photos: Path, output: Path) -> Iterator[dict[str, Any]]:
    """Yield conversations about photos, one about each, and then about crops of them.

    The model says of a crop what it doesn't say of the photo: without them a draft learns a few
    thousand replies by heart, and is right far less often on those to other photos.

    Args:
        photos: A folder in Flickr8k's layout.
        output: A folder with a folder for crops.

    Raises:
        InputError: The photos can't be read.
        StorageError: A crop can't be written.
    """
    shown = typical_first(read_flickr8k(photos, "train"))
    for place in count():
        if place % len(shown) == 0:
            random.shuffle(shown)
        photo = shown[place % len(shown)]
        path = photo.path.absolute()
        if place >= len(shown):
            path = output.absolute() / CROPS / f"{place}.jpg"
            with load_image(photo.path) as image, storage_errors(output):
                random_crop(image).save(path, quality=90)
        _, prompt, reply = random.choice(about_photo(photo.captions))
        yield row(str(path), prompt, reply)


def random_crop(image: Image) -> Image:
    """Return a part of an image, mirrored or not."""
    width, height = (round(side * random.uniform(SMALLEST_CROP, 1)) for side in image.size)
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    part = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(part) if random.getrandbits(1) else part


def row(image: str, prompt: str, reply: str) -> dict[str, Any]:
    """Return a conversation in LLaVA's layout."""
    return {
        "image": image,
        "conversations": [
            {"from": "human", "value": f"<image>\n{prompt}"},
            {"from": "gpt", "value": reply},
        ],
    }
