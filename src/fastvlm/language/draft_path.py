"""What a draft step runs, as a decoder is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class DraftPath(NamedTuple):
    """What a draft step runs.

    Args:
        exit_layer: Layers of the target (k).
        blocks: Layers of the target's kind that stand for the others.
        mlp: What makes the last layer's states of the exit layer's instead; None for nothing.
        rows: The LM head's rows of the tokens that can be drafted, see `lm_head_rows`; None for all
            of the head.
        tokens: The tokens that can be drafted: (tokens,); None for all.
    """

    exit_layer: int
    blocks: Sequence[nn.Module]
    mlp: nn.Module | None
    rows: Tensor | None
    tokens: Tensor | None = None


class Draws(NamedTuple):
    """How draft steps draw their tokens.

    Args:
        temperature: By which logits are divided.
        noise: What is added to each step's logits then: (steps, tokens).
    """

    temperature: float
    noise: Tensor
