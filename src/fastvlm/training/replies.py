"""A target's own replies, which its draft learns from; decoded by our engine, kept on disk."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvlm.data.questions import Question
from fastvlm.decoding import Autoregressive, Decoding
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.training.checkpoint import write_checkpoint
from fastvlm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt with its visual tokens and the target's own reply.

    Args:
        tokens: Prompt and reply.
        reply_start: Where the reply begins.
        features: The picture's visual tokens, (visual tokens, d_model).
    """

    tokens: list[int]
    reply_start: int
    features: Tensor


SAVE_EVERY = 8
"""Batches between two writings of the cache."""


@torch.inference_mode()
def own_replies(
    vlm: VisionLanguageModel,
    asked: Sequence[Question],
    cache: Path,
    *,
    batch: int = 48,
    max_new_tokens: int = 160,
) -> list[Dialogue]:
    """Return the target's greedy replies, from the cache where it has answered before.

    The cache's key is made of the target's weights, the questions and the options. It is written
    every few batches, so that a killed run goes on from there.
    """
    plan = [fingerprint(vlm.model), max_new_tokens, [(q.prompt, q.picture) for q in asked]]
    key = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
    file = cache / f"replies-{key}.pt"
    rows = torch.load(file, weights_only=True) if file.is_file() else []
    image = vlm.model.config.image_token_id
    started, first = time.monotonic(), len(rows)
    for index in range(first, len(asked), batch):
        chosen = asked[index : index + batch]
        requests = [
            vlm.request(q.prompt, q.open(vlm.image_size), max_new_tokens=max_new_tokens)
            for q in chosen
        ]
        for _ in Decoding(vlm.decoder, Autoregressive(), requests):
            pass
        for request in requests:
            places = torch.tensor(request.tokens) == image
            rows.append(
                (
                    request.tokens + request.reply,
                    len(request.tokens),
                    request.embeddings[places].clone(),
                )
            )
        if index // batch % SAVE_EVERY == 0 or len(rows) == len(asked):
            write_checkpoint(file, rows)
            left = (time.monotonic() - started) / (len(rows) - first) * (len(asked) - len(rows))
            print(  # noqa: T201
                f"replies {len(rows)}/{len(asked)}  {left:.0f} s left", file=sys.stderr, flush=True
            )
    return [Dialogue(*row) for row in rows]
