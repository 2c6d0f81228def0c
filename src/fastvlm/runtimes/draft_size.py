"""How large a draft step may be to be one graph."""

from __future__ import annotations

from itertools import chain

from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.draft_path import DraftPath

LARGEST_DRAFT = 2**25
"""Weights of a draft step up to which it is made a graph of. Graphs are made of copies in float32,
and each number of steps in one holds them once more, in 8 bits."""


def is_small(split: SplitDecoder, path: DraftPath) -> bool:
    """Return whether a draft step is small enough, without reading its weights."""
    parts = [*split.layers[: path.exit_layer], *path.blocks]
    if path.mlp is not None:
        parts.append(path.mlp)
    weights = chain.from_iterable(chain(part.parameters(), part.buffers()) for part in parts)
    head = 0 if path.rows is None else path.rows.numel()
    return head + sum(weight.numel() for weight in weights) <= LARGEST_DRAFT
