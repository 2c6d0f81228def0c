"""Write what the model learns from: sentences and descriptions of captioned photos.

python recipes/gemma3-270m/conversations.py FLICKR8K runs/conversations.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fastvlm.cli import run
from fastvlm.data.captioned import CaptionedImage, read_flickr8k, typical_first, words_of
from fastvlm.functional.files import write_json

DESCRIPTION_PROMPT = "Describe the picture in several sentences."
MOST_SENTENCES = 4
"""Sentences of the longest description."""
MOST_SHARED = 0.5
"""The share of the words of two sentences up to which both are in one description."""


def description(captions: Sequence[str]) -> str:
    """Return a photo's captions in a row, without those that repeat another."""
    chosen: list[str] = []
    for caption in captions:
        words = words_of(caption)
        others = [words_of(other) for other in chosen]
        if all(len(words & other) <= MOST_SHARED * len(words | other) for other in others):
            chosen.append(caption)
    return " ".join(chosen[:MOST_SENTENCES])


def rows(
    photos: Sequence[CaptionedImage], sentences: int, described: int
) -> list[dict[str, object]]:
    """Return the rows of some photos, in the layouts that `fastvlm train model` reads.

    Args:
        photos: The photos, the most typical caption of each first.
        sentences: Captions of each photo that are learnt as sentences.
        described: Every so many photos there is a description, too; 0 for none.
    """
    found: list[dict[str, object]] = []
    for number, photo in enumerate(photos):
        captions = [*dict.fromkeys(photo.captions)]
        image = str(photo.path.resolve())
        found.append({"image": image, "captions": captions[:sentences]})
        if described and number % described == 0:
            turns = [
                {"from": "human", "value": f"<image>\n{DESCRIPTION_PROMPT}"},
                {"from": "gpt", "value": description(captions)},
            ]
            found.append({"image": image, "conversations": turns})
    return found


def write(
    photos: Annotated[Path, typer.Argument(metavar="FLICKR8K", help="The photos' folder.")],
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The file to be written.")],
    split: Annotated[str, typer.Option(metavar="NAME", help="The photos' split.")] = "train",
    sentences: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Captions of each photo that are learnt as sentences: those that agree most with"
            " the others.",
        ),
    ] = 2,
    described: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Every N photos there is a description, too; 0 for none."
        ),
    ] = 3,
) -> None:
    """Write the conversations about a split of Flickr8k's photos."""
    found = rows(typical_first(read_flickr8k(photos, split)), sentences, described)
    write_json(output, found)


app = typer.Typer(add_completion=False)
app.command()(write)

if __name__ == "__main__":
    sys.exit(run(app=app))
