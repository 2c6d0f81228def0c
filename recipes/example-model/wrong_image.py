"""Whether the example model looks: its loss on captions with the right and a wrong image.

Run `python recipes/example-model/wrong_image.py FLICKR8K`; the figures stand in the model's card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import fastvlm
from fastvlm.data.captioned import CaptionedImage, read_flickr8k
from fastvlm.training.rows import IGNORED
from fastvlm.vision.images import prepare
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import SENTENCE_PROMPT


@torch.inference_mode()
def caption_losses(
    vlm: VisionLanguageModel, photos: Sequence[CaptionedImage], batch: int = 50
) -> dict[str, float]:
    """Return the cross-entropy per token of human captions with the right and a wrong image.

    The wrong image is the next photo's. One caption of each photo is taken.
    """
    prompt = vlm.tokens(SENTENCE_PROMPT, images=1)
    sums = {"right": 0.0, "wrong": 0.0}
    count = 0
    for start in range(0, len(photos), batch):
        shown = photos[start : start + batch]
        captions = [[*vlm.tokenizer.encode(p.captions[0]), min(vlm.end_tokens)] for p in shown]
        width = max(len(caption) for caption in captions)
        tokens = torch.zeros(len(shown), len(prompt) + width, dtype=torch.long)
        labels = torch.full_like(tokens, IGNORED)
        for row, caption in enumerate(captions):
            whole = torch.tensor(prompt + caption)
            tokens[row, : len(whole)] = whole
            labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
        learnt = int((labels != IGNORED).sum())
        pixels = torch.cat([prepare(p.path, vlm.image_size) for p in shown])
        for kind, seen in (("right", pixels), ("wrong", pixels.roll(1, 0))):
            # Padding stands on the right, where the causal mask hides it.
            loss = vlm.model(input_ids=tokens, pixel_values=seen, labels=labels).loss
            sums[kind] += float(loss) * learnt
        count += learnt
    return {kind: value / count for kind, value in sums.items()}


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
