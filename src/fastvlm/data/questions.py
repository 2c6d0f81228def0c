"""Questions about images: what benchmarks measure with and drafts learn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastvlm.data.conversations import Conversation, Records
from fastvlm.embedded import DESCRIPTION_PROMPT, SCENE_PROMPT, SENTENCE_PROMPT
from fastvlm.functional.errors import InputError
from fastvlm.scenes import describe, render, sample

HELD_OUT_SCENES = 1_000_000_000
"""Scenes with seeds from here on are never trained on."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt about a scene (its seed), about a photo (its path), or about no image."""

    prompt: str
    image: int | str | None

    def open(self, size: int) -> Image.Image | Path:
        """Return the image: a scene rendered at `size` pixels, or the photo's path.

        Raises:
            InputError: It is a question without an image.
        """
        if self.image is None:
            raise InputError("This is a question without an image.")
        if isinstance(self.image, int):
            return render(sample(self.image), size)
        return Path(self.image)


def about_scenes(seeds: Iterable[int]) -> list[Question]:
    """Return the question for an exact description of each scene."""
    return [Question(SCENE_PROMPT, seed) for seed in seeds]


def scene_conversations(seeds: Sequence[int], size: int) -> Records:
    """Return a conversation about each scene, drawn at `size` pixels: its exact description."""

    def convert(name: str, seed: int) -> Conversation:
        scene = sample(seed)
        shown = {"type": "image", "image": render(scene, size)}
        asked = {"type": "text", "text": SCENE_PROMPT}
        said = {"type": "text", "text": describe(scene)}
        return Conversation(
            name,
            (
                {"role": "user", "content": [shown, asked]},
                {"role": "assistant", "content": [said]},
            ),
        )

    return Records(seeds, convert, lambda _, seed: f"scene {seed}")


def about_photos(
    paths: Iterable[Path], prompts: tuple[str, ...] = (DESCRIPTION_PROMPT, SENTENCE_PROMPT)
) -> list[Question]:
    """Return each prompt's question about each photo."""
    return [Question(prompt, str(path)) for path in paths for prompt in prompts]


def images_in(folder: Path, limit: int | None = None) -> list[Path]:
    """Return the images of a folder in the order of their names.

    Raises:
        InputError: There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder of images at {folder}.")
    found = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not found:
        raise InputError(f"There is no image in {folder}.")
    return found[:limit]
