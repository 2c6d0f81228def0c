"""Whether the example model looks: its loss on captions with the right and a wrong image.

Run `python recipes/example-model/wrong_image.py FLICKR8K`; the figures stand in the model's card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import fastvlm
from fastvlm.data.captioned import CaptionedImage, read_flickr8k
from fastvlm.data.conversations import Conversation
from fastvlm.prompts.messages import question
from fastvlm.training.reply_scores import score_replies
from fastvlm.training.rows import FastViTHDRows
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import SENTENCE_PROMPT


@torch.inference_mode()
def caption_losses(
    vlm: VisionLanguageModel, photos: Sequence[CaptionedImage], batch: int = 50
) -> dict[str, float]:
    """Return the cross-entropy per token of human captions with the right and a wrong image.

    The wrong image is the photo's before it. One caption of each photo is taken.
    """
    builder = FastViTHDRows(vlm.model, vlm.tokenizer, vlm.image_size)
    sums = {"right": 0.0, "wrong": 0.0}
    count = 0
    for start in range(0, len(photos), batch):
        right = [
            row for photo in photos[start : start + batch] for row in builder.rows(captioned(photo))
        ]
        wrong = [
            replace(row, inputs={**row.inputs, "pixel_values": other.inputs["pixel_values"]})
            for row, other in zip(right, right[-1:] + right[:-1], strict=True)
        ]
        for kind, rows in (("right", right), ("wrong", wrong)):
            losses = torch.cat([row.losses for row in score_replies(vlm.model, builder, rows)])
            sums[kind] += float(losses.sum())
        count += len(losses)
    return {kind: value / count for kind, value in sums.items()}


def captioned(photo: CaptionedImage) -> Conversation:
    """Return the question for a sentence about a photo, and its first caption."""
    caption = {"role": "assistant", "content": [{"type": "text", "text": photo.captions[0]}]}
    return Conversation(str(photo.path), (*question(SENTENCE_PROMPT, photo.path), caption))


def main() -> None:
    """Print the two losses per token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="captioned ones, in Flickr8k's layout")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int, default=1000)
    given = parser.parse_args()
    shown = read_flickr8k(given.photos, given.split)[: given.limit]
    losses = caption_losses(fastvlm.load(prefix_bytes=0), shown)
    print(f"right image {losses['right']:.3f}, another one {losses['wrong']:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
