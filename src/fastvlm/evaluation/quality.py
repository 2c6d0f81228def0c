"""Whether the model sees: facts of unseen scenes, losses with a wrong photo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastvlm.data.captioned import CaptionedImage
from fastvlm.data.questions import Question
from fastvlm.embedded import SENTENCE_PROMPT
from fastvlm.scenes import FactScore, sample, score
from fastvlm.scenes.facts import KINDS
from fastvlm.vision.images import prepare
from fastvlm.vlm import VisionLanguageModel

IGNORED = -100
"""The label of a token whose loss `transformers` leaves out."""


def score_scenes(questions: Sequence[Question], replies: Sequence[str]) -> dict[str, Any]:
    """Return the share of right facts in descriptions of scenes, in all and by kind."""
    seeds = [int(question.image) for question in questions if question.image is not None]
    scores = [score(reply, sample(seed)) for seed, reply in zip(seeds, replies, strict=True)]
    total = sum(scores, FactScore())
    exact = sum(one.accuracy == 1.0 for one in scores)
    return {
        "scenes": len(questions),
        "facts_stated": total.stated,
        "facts_right": total.right,
        "facts_missing": total.missing,
        "accuracy": total.accuracy,
        "exact_descriptions": exact,
        "by_kind": {kind: total.of(kind).accuracy for kind in KINDS if total.of(kind).stated},
    }


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
