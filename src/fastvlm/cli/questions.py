"""What `benchmark` and `audit` ask a model, and about which images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm import embedded
from fastvlm.cli.loading import UsageError
from fastvlm.cli.terminal import print_error
from fastvlm.functional.errors import InputError, StorageError
from fastvlm.functional.text_files import read_text

if TYPE_CHECKING:
    from fastvlm.data.questions import Question
    from fastvlm.vlm import VisionLanguageModel

SCENES, NO_IMAGES, SHIPPED = "scenes", "none", "shipped"
WORDS = {SCENES: "scenes", NO_IMAGES: "prompts"}
"""What `--images` stands for, in a sentence; a folder's are images."""
TEXT_PROMPTS = (
    "Explain in a few sentences how a rainbow forms.",
    "Write a short story about a lighthouse keeper.",
    "What are the advantages and disadvantages of living in a large city?",
)
"""What a model of text alone is asked, if nothing is said."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model is asked: options of `benchmark` and `audit`.

    Args:
        images: `scenes`, `shipped`, `none` or a folder; None for what suits the model.
        prompt: What is asked of each image.
        listing: A file with the names of the folder's images to take.
    """

    images: Annotated[
        str | None,
        typer.Option(
            metavar="scenes|shipped|none|DIR",
            help="Rendered scenes that no training has seen, the images that ship with fastvlm, no"
            " image at all, or a folder of images.",
            show_default="scenes for the model that ships, shipped for any other, none for one of"
            " text alone",
        ),
    ] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="What is asked of each image. Give it again for several.",
            show_default=f"'{embedded.SCENE_PROMPT}' of scenes, else"
            f" '{embedded.DESCRIPTION_PROMPT}'",
        ),
    ] = None
    listing: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file with the names of the folder's images to take, one a line.",
            show_default="all of the folder",
        ),
    ] = None

    def check(self) -> None:
        """Refuse what can be refused before a model is loaded.

        Raises:
            UsageError: A listing is given where there is no folder, or there is nothing to ask.
            InputError: There is no such folder or listing.
        """
        if self.images in (None, SCENES, SHIPPED, NO_IMAGES):
            if self.listing is not None:
                raise UsageError("--listing names images of a folder: give that as --images DIR.")
            if self.images == NO_IMAGES and not self.prompt:
                raise UsageError("--images none needs a --prompt.")
            return
        if self.listing is not None and not self.listing.is_file():
            raise InputError(f"There is no list of images at {self.listing}.")
        self._files(1)

    def chosen_images(self, model: str | None, vlm: VisionLanguageModel) -> str:
        """Return what the images are: those asked for, or those that suit the model."""
        if self.images is not None:
            return self.images
        if not getattr(vlm.prompts, "shows_images", True):
            return NO_IMAGES
        return SCENES if model is None else SHIPPED

    def questions(self, images: str, limit: int) -> tuple[list[Question], bool]:
        """Return the questions, and whether an image was left out because it can't be read.

        Args:
            images: As `chosen_images` returns it.
            limit: The most images; the most prompts where there are none.

        Raises:
            InputError: No image can be read.
        """
        from fastvlm.data.questions import HELD_OUT_SCENES, Question

        if images == NO_IMAGES:
            prompts = (self.prompt or TEXT_PROMPTS)[:limit]
            return [Question(prompt, None) for prompt in prompts], False
        if images == SCENES:
            scenes = range(HELD_OUT_SCENES, HELD_OUT_SCENES + limit)
            asked = self.prompt or [embedded.SCENE_PROMPT]
            return [Question(prompt, scene) for scene in scenes for prompt in asked], False
        found = self._files(limit, embedded.PICTURES if images == SHIPPED else Path(images))
        read = readable(found)
        if not read:
            raise InputError(f"No image in {images} can be read.")
        asked = self.prompt or [embedded.DESCRIPTION_PROMPT]
        questions = [Question(prompt, str(path)) for path in read for prompt in asked]
        return questions, len(read) < len(found)

    def _files(self, limit: int, folder: Path | None = None) -> list[Path]:
        from fastvlm.data.questions import pictures_in

        folder = folder or Path(self.images or "")
        if self.listing is None:
            return pictures_in(folder, limit)
        names = read_text(self.listing).splitlines()
        return [folder / name.strip() for name in names if name.strip()][:limit]


def readable(files: Sequence[Path]) -> list[Path]:
    """Return the images that can be read, and say what is wrong with the others."""
    from fastvlm.vision.loading import load_image

    read = []
    for path in files:
        try:
            load_image(path)
        except (InputError, StorageError) as error:
            print_error(str(error))
        else:
            read.append(path)
    return read
