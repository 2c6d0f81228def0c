"""How the example model and its draft hold for prompts in other words, and what its texts repeat.

python recipes/example-model/prompts.py --photos FLICKR8K --images COCO --json FILE

For each prompt: how many drafted tokens are accepted (in drafts of four), and how often the reply
has as many sentences as its kind should. For descriptions of a folder of images: how many repeat a
sentence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastvlm
from fastvlm.data.captioned import read_flickr8k
from fastvlm.decoding.reply import Reply
from fastvlm.functional.statistics import Acceptance
from fastvlm.vision.loading import ImageInput
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import DESCRIPTION_PROMPT, DRAFT, HELD_OUT_SCENES, MODEL
from fastvlm_example.scenes import render, sample
from recipe.descriptions import nearly_repeated, sentences_of
from recipe.wordings import CANONICAL, HELD_OUT

DRAFTED = 4
"""Tokens of each draft: the acceptance of drafts that adapt is not that of the drafter alone."""
MAX_NEW_TOKENS = 160


def ask(vlm: VisionLanguageModel, prompt: str, images: Sequence[ImageInput]) -> list[Reply]:
    """Return the replies to a prompt about each image, drafted in drafts of `DRAFTED`.

    Raises:
        InputError: An image can't be read.
    """
    drafts = vlm.strategy("imitation", num_speculative_tokens=DRAFTED, confidence=0.0)
    return [
        vlm.generate(prompt, one, strategy=drafts, max_new_tokens=MAX_NEW_TOKENS) for one in images
    ]


def of_prompts(
    vlm: VisionLanguageModel, photos: Sequence[ImageInput], scenes: Sequence[ImageInput]
) -> list[dict[str, Any]]:
    """Return figures of each prompt, the trained one of its kind first."""
    found = []
    for kind, canonical in CANONICAL.items():
        for prompt in (canonical, *HELD_OUT[kind]):
            replies = ask(vlm, prompt, scenes if kind == "scene" else photos)
            worth = Acceptance.over([reply.statistics for reply in replies])
            lengths = [len(sentences_of(reply.text)) for reply in replies]
            found.append(
                {
                    "kind": kind,
                    "prompt": prompt,
                    "trained": prompt == canonical,
                    "accepted": worth.rate,
                    "sentences": sum(lengths) / len(lengths),
                }
            )
    return found


def of_descriptions(vlm: VisionLanguageModel, images: Sequence[ImageInput]) -> dict[str, Any]:
    """Return how many descriptions of images say a sentence twice, or nearly."""
    asked = [DESCRIPTION_PROMPT] * len(images)
    texts = [
        reply.text
        for reply in vlm.generate_batch(
            asked, images, strategy="autoregressive", max_new_tokens=MAX_NEW_TOKENS
        )
    ]
    parts = [sentences_of(text) for text in texts]
    return {
        "descriptions": len(texts),
        "repeat a sentence": sum(len({*said}) < len(said) for said in parts),
        "nearly repeat one": sum(nearly_repeated(said) for said in parts),
        "sentences": sum(map(len, parts)) / len(parts),
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "texts": texts,
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--draft", type=Path, default=DRAFT)
    parser.add_argument("--photos", type=Path, required=True, help="in Flickr8k's layout")
    parser.add_argument("--images", type=Path, required=True, help="a folder, to be described")
    parser.add_argument("--limit", type=int, default=40, help="photos of each prompt")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    vlm = fastvlm.load(given.model, draft=given.draft)
    photos = [photo.path for photo in read_flickr8k(given.photos, "dev")[: given.limit]]
    scenes = [render(sample(HELD_OUT_SCENES + n), vlm.image_size) for n in range(given.limit // 2)]
    images = sorted(path for path in given.images.iterdir() if path.suffix in (".jpg", ".png"))
    figures = {
        "descriptions": of_descriptions(vlm, images),
        "prompts": of_prompts(vlm, photos, scenes),
    }
    text = json.dumps(figures, indent=1)
    if given.json is not None:
        given.json.write_text(text + "\n", "utf-8")
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
