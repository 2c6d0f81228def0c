"""What a draft for the example model is asked: photos and scenes, in many words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastvlm.data.captioned import read_flickr8k, typical_first
from fastvlm.functional.files import storage_errors, write_json
from fastvlm_example import HELD_OUT_SCENES
from fastvlm_example.scenes import render, sample
from recipe.conversations import about_photo, about_scene

IMAGES = "scenes"


def write_questions(
    photos: Path, output: Path, *, number: int, scenes: int, size: int, seed: int = 0
) -> None:
    """Write conversations about photos and scenes, for `fastvlm train draft --data output`.

    Args:
        photos: A folder in Flickr8k's layout.
        output: The folder of `conversations.json`, and of the scenes' images.
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
        (output / IMAGES).mkdir(parents=True, exist_ok=True)
    rows = [*islice(photo_rows(photos), number)]
    for place in range(scenes):
        scene = sample(random.randrange(HELD_OUT_SCENES))
        file = output / IMAGES / f"{place}.png"
        with storage_errors(output):
            render(scene, size).save(file)
        _, prompt, reply = about_scene(scene, 0.0)
        rows.append(row(f"{IMAGES}/{file.name}", prompt, reply))
    write_json(output / "conversations.json", rows)


def photo_rows(photos: Path) -> Iterator[dict[str, Any]]:
    """Yield conversations about photos, one about each, and then again.

    Raises:
        InputError: The photos can't be read.
    """
    shown = typical_first(read_flickr8k(photos, "train"))
    while True:
        random.shuffle(shown)
        for photo in shown:
            _, prompt, reply = random.choice(about_photo(photo.captions))
            yield row(str(photo.path.absolute()), prompt, reply)


def row(image: str, prompt: str, reply: str) -> dict[str, Any]:
    """Return a conversation in LLaVA's layout."""
    return {
        "image": image,
        "conversations": [
            {"from": "human", "value": f"<image>\n{prompt}"},
            {"from": "gpt", "value": reply},
        ],
    }
