"""Unlikelihood training: what a description of the model's own says again becomes unlikelier.

Greedy decoding says one sentence over and over, whatever the descriptions that were learnt: each
repetition makes the next likelier. Here the model writes descriptions greedily, and those of its
tokens that end an n-gram which stands before in the same description lose probability (Welleck et
al. 2020, arXiv 1908.04319, "sequence-level unlikelihood training").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NGRAM = 4
"""Tokens in a row that count as repeated."""
MAX_NEW_TOKENS = 72
"""Tokens of the longest description: three or four sentences, or one and its repetitions."""
LEAST_LOSS = 1e-6
"""A token more certain than this has no gradient: float32 has no number for what is left."""


def repeated(tokens: Sequence[int]) -> list[bool]:
    """Return whether each token ends an n-gram that stands before."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for place in range(len(tokens)):
        last = tuple(tokens[max(0, place + 1 - NGRAM) : place + 1])
        found.append(len(last) == NGRAM and last in seen)
        seen.add(last)
    return found


def unlikelihood(losses: Tensor) -> Tensor:
    """Return the negative logarithm of the probability of every other token: (tokens,).

    Args:
        losses: The negative logarithm of each token's own: (tokens,).
    """
    return -torch.log(-torch.expm1(-losses.clamp(min=LEAST_LOSS)))
