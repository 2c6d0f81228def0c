"""Questions about images, for benchmarks and for training drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastvlm.data.conversations import Conversation, Records
from fastvlm.example import example
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import parse_json, read_text

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt about a scene (its seed), about a photo (its path), or about no image.

    Args:
        prompt: The prompt.
        image: The image.
        kind: What kind of question it is, for results of each kind apart.
    """

    prompt: str
    image: int | str | None
    kind: str = ""

    def open(self, size: int) -> Image.Image | Path:
        """Return the image: a scene rendered with a side of `size` pixels, or the photo's path.

        Raises:
            InputError: The question has no image.
        """
        if self.image is None:
            raise InputError("This is a question without an image.")
        if isinstance(self.image, int):
            scenes = example().scenes
            drawn: Image.Image = scenes.render(scenes.sample(self.image), size)
            return drawn
        return Path(self.image)


def scene_conversations(seeds: Sequence[int], size: int) -> Records:
    """Return a conversation about each scene, with its exact description as the reply.

    Args:
        seeds: The scenes' seeds.
        size: Side of the rendered images in pixels.
    """
    shipped = example()
    scenes = shipped.scenes

    def convert(name: str, seed: int) -> Conversation:
        scene = scenes.sample(seed)
        shown = {"type": "image", "image": scenes.render(scene, size)}
        asked = {"type": "text", "text": shipped.SCENE_PROMPT}
        said = {"type": "text", "text": scenes.describe(scene)}
        return Conversation(
            name,
            (
                {"role": "user", "content": [shown, asked]},
                {"role": "assistant", "content": [said]},
            ),
        )

    return Records(seeds, convert, lambda _, seed: f"scene {seed}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to ask.

    Args:
        text: The prompt, as it is.
        kind: What kind of prompt it is.
    """

    text: str
    kind: str = ""


def read_prompts(file: Path) -> list[Prompt]:
    """Read prompts, one a line: a JSON object with `prompt` and perhaps `kind`.

    Raises:
        InputError: The file can't be read, a line is none, or there is no line.
    """
    found = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        match row:
            case {"prompt": str(text), **rest} if text.strip():
                found.append(Prompt(text, str(rest.get("kind", ""))))
            case _:
                raise InputError(f"Line {number} of {file} is no JSON object with a prompt.")
    if not found:
        raise InputError(f"There is no prompt in {file}.")
    return found


def images_in(folder: Path, limit: int | None = None) -> list[Path]:
    """Return the images of a folder in the order of their names.

    Raises:
        InputError: There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder of images at {folder}.")
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not found:
        raise InputError(f"There is no image in {folder}.")
    return found[:limit]
