"""The questions of `benchmark` and `audit`, and their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm.cli.loading import UsageError
from fastvlm.cli.terminal import print_error
from fastvlm.example import example
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_text

if TYPE_CHECKING:
    from fastvlm.data.questions import Prompt, Question
    from fastvlm.vlm import VisionLanguageModel

SCENES, NO_IMAGES, EXAMPLE = "scenes", "none", "example"
WORDS = {SCENES: "scenes", NO_IMAGES: "prompts"}
"""What `--images` stands for, in a sentence; a folder's are images."""
MAX_FAILED = 0.05
"""The default maximum share of questions that may fail."""
MaxFailedOption = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        min=0,
        max=1,
        help="Questions that can't be asked, such as one whose image can't be read, are named and"
        " left out; more than this share of all ends the run.",
    ),
]
DESCRIPTION_PROMPT = "Describe the image in several sentences."
"""The default prompt for an image."""
TEXT_PROMPTS = (
    "Explain in a few sentences how a rainbow forms.",
    "Write a short story about a lighthouse keeper.",
    "What are the advantages and disadvantages of living in a large city?",
)
"""The default prompts for a model of text alone."""


@dataclass(frozen=True, slots=True)
class QuestionOptions:
    """The questions of `benchmark` and `audit`.

    Args:
        images: `scenes`, `example`, `none` or a folder; None for the model's default.
        prompt: The prompts for each image.
        prompts: A file of prompts instead.
        listing: A file with the names of the folder's images to use.
        max_failed: The maximum share of questions that may fail, from 0 to 1.
    """

    images: Annotated[
        str | None,
        typer.Option(
            metavar="scenes|example|none|DIR",
            help="Rendered scenes that no training has seen, the images of the example model, no"
            " image at all, or a folder of images.",
            show_default="scenes for the example model, example for any other, none for one of text"
            " alone",
        ),
    ] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="What is asked of each image. Give it again for several.",
            show_default=f"'{DESCRIPTION_PROMPT}'; the example model is asked in its own words",
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What is asked, from a file of JSON lines with a prompt and perhaps its kind; the"
            " figures are then given for each kind, too.",
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
    max_failed: MaxFailedOption = MAX_FAILED

    def check(self) -> None:
        """Check the options before a model is loaded.

        Raises:
            UsageError: A listing is given without a folder, or there is nothing to ask.
            InputError: There is no such folder or listing.
        """
        if self.prompts is not None:
            if self.prompt:
                raise UsageError("--prompt and --prompts say the same: give one of them.")
            self._asked()
        if self.images in (None, SCENES, EXAMPLE, NO_IMAGES):
            if self.listing is not None:
                raise UsageError("--listing names images of a folder: give that as --images DIR.")
            if self.images == NO_IMAGES and not self.prompt and self.prompts is None:
                raise UsageError("--images none needs a --prompt.")
            return
        if self.listing is not None and not self.listing.is_file():
            raise InputError(f"There is no list of images at {self.listing}.")
        self._files(1)

    def chosen_images(self, model: str | None, vlm: VisionLanguageModel) -> str:
        """Return the images asked for, or the model's default.

        Raises:
            UsageError: The model reads text alone, and images are asked for.
        """
        if not vlm.prompts.shows_images:
            if self.images not in (None, NO_IMAGES):
                raise UsageError("The model reads text alone: give it --images none.")
            return NO_IMAGES
        return self.images or (SCENES if model is None else EXAMPLE)

    def questions(self, model: str | None, images: str, limit: int) -> list[Question]:
        """Return the questions.

        Args:
            model: The model as typed.
            images: The result of `chosen_images`.
            limit: The maximum number of images, or of prompts where there are no images.

        Raises:
            InputError: There is no image.
        """
        from fastvlm.data.questions import Question

        if images == NO_IMAGES:
            return [Question(one.text, None, one.kind) for one in self._asked(*TEXT_PROMPTS)][
                :limit
            ]
        if images == SCENES:
            asked = self._asked(example().SCENE_PROMPT)
            first = example().HELD_OUT_SCENES
            scenes = range(first, first + limit)
            return [Question(one.text, scene, one.kind) for scene in scenes for one in asked]
        found = self._files(limit, example().IMAGES if images == EXAMPLE else Path(images))
        asked = self._asked(description_prompt(model))
        return [Question(one.text, str(path), one.kind) for path in found for one in asked]

    def _asked(self, *usual: str) -> list[Prompt]:
        """Return the prompts, or the usual ones where none is given."""
        from fastvlm.data.questions import Prompt, read_prompts

        if self.prompts is not None:
            return read_prompts(self.prompts)
        return [Prompt(text) for text in self.prompt or usual]

    def _files(self, limit: int, folder: Path | None = None) -> list[Path]:
        from fastvlm.data.questions import images_in

        folder = folder or Path(self.images or "")
        if self.listing is None:
            return images_in(folder, limit)
        names = read_text(self.listing).splitlines()
        return [folder / name.strip() for name in names if name.strip()][:limit]


def description_prompt(model: str | None) -> str:
    """Return the default prompt for an image.

    Args:
        model: The model as typed; None for the example model, which has a prompt of its own.
    """
    return str(example().DESCRIPTION_PROMPT) if model is None else DESCRIPTION_PROMPT


class FailedQuestions:
    """Reports questions that can't be asked; too many of them end the run.

    Args:
        total: The number of questions in the run.
        share: The maximum share of them that may fail, from 0 to 1.
    """

    def __init__(self, total: int, share: float) -> None:
        self.total, self.share = total, share
        self.found: list[dict[str, Any]] = []
        """The images and prompts of those that failed, and the reason: for the figures."""

    def __call__(self, question: Question, error: InputError) -> None:
        """Report a question that can't be asked.

        Raises:
            InputError: Too many failed.
        """
        self.found.append({**asdict(question), "reason": str(error)})
        name = "" if question.image is None else f" about {question.image}"
        print_error(f"A question{name} is left out: {error}")
        if len(self.found) > self.share * self.total:
            raise InputError(
                f"{len(self.found)} of {self.total} questions failed, and --max-failed is"
                f" {self.share:g}."
            )

    def readable(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions whose image can be read, before the long work.

        Raises:
            InputError: Too many images can't be read, or none can.
        """
        from fastvlm.vision.loading import load_image

        found, errors = [], dict[Any, InputError | None]()
        for question in questions:
            image = question.image
            if isinstance(image, str) and image not in errors:
                errors[image] = None
                try:
                    load_image(image)
                except InputError as error:
                    errors[image] = error
            wrong = errors.get(image)
            if wrong is None:
                found.append(question)
            else:
                self(question, wrong)
        if not found:
            raise InputError("None of the images can be read.")
        return found

    def exit(self) -> None:
        """Exit with code 1 if a question failed."""
        if self.found:
            raise typer.Exit(1)
