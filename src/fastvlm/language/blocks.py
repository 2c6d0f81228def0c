"""Bidirectional blocks of prompts, read from the masks that a model hands its decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvlm.functional.errors import InputError
from fastvlm.language.decoder_inputs import OUTSIDE
from fastvlm.language.masks import FULL, MaskKind, in_the_same_block
from fastvlm.language.structure import attends_causally

HIDING_BIAS = -1e4
"""The greatest number that hides a key where a mask is added to scores: those are of the order of
tens, so that nothing is left of exp(score - 10,000). Models write minus infinity, the least number
of a precision (-65,504 in half precision) or, older ones, this very number; a bias that is meant to
be added, as by distance, lies far above."""


class RowBlocks(NamedTuple):
    """The bidirectional blocks of a row, see `DecoderInputs`."""

    blocks: Tensor | None = None
    windows_limit_blocks: bool = False


def row_blocks(decoder: Any, mask: Any, own: Tensor) -> list[RowBlocks]:
    """Return the bidirectional blocks of each row.

    Args:
        decoder: The decoder, as `transformers` made it.
        mask: What it was handed: None, or 1 for a row's own positions, (batch, length), for causal
            prompts; else which keys each position sees, (batch, 1, length, length), for all layers
            or by their kind.
        own: Which positions are a row's own: (batch, length).

    Raises:
        InputError: Positions see others than those before them and those of their own block.
    """
    config = decoder.config
    masks = mask if isinstance(mask, Mapping) else {"full_attention": mask}
    # Without padding a layer may get no mask, and not all are causal by themselves.
    unpadded = config._attn_implementation == "sdpa" and bool(own.all())
    both_ways = unpadded and not attends_causally(decoder)
    square = {}
    for kind, given in masks.items():
        if isinstance(given, Tensor) and given.dim() == 4:  # noqa: PLR2004 (batch, heads, ...)
            square[kind] = given
        elif given is not None and not (isinstance(given, Tensor) and given.shape == own.shape):
            raise InputError(f"The model's mask ({kind}) is of a form that fastvlm doesn't know.")
        elif both_ways:
            square[kind] = own[:, None, None].expand(-1, 1, own.shape[1], -1)
    kinds = {
        "full_attention": FULL,
        "sliding_attention": MaskKind(window=getattr(config, "sliding_window", None)),
        "chunked_attention": MaskKind(chunk=getattr(config, "attention_chunk_size", None)),
    }
    found = []
    for row, places in enumerate(own):
        seen = {
            kinds.get(kind, FULL): visible(given[row, 0], places) for kind, given in square.items()
        }
        blocks = blocks_of(seen[FULL]) if FULL in seen else None
        known = [
            one
            for one in (RowBlocks(blocks), RowBlocks(blocks, windows_limit_blocks=True))
            if all(
                torch.equal(shown, expected(kind, one, len(shown))) for kind, shown in seen.items()
            )
        ]
        if not known:
            raise InputError(
                "The model masks its prompt in a way of its own, in which fastvlm can't decode it;"
                " if generate was asked for cache_implementation='static', leave that out."
                if not both_ways
                else "Some of the model's layers see all of a prompt in both directions, for want"
                " of a mask, and others don't; load it with attn_implementation='eager', with which"
                " each is given one."
            )
        found.append(known[0])
    return found


def visible(mask: Tensor, places: Tensor) -> Tensor:
    """Return which of a row's own positions see which: (own, own).

    Args:
        mask: True, or 0, for what is seen; False, or at most `HIDING_BIAS`, for what is not:
            (length, keys).
        places: Which positions are the row's own: (length,).

    Raises:
        InputError: There are other keys than positions, or other numbers.
    """
    if mask.shape != (len(places), len(places)):
        raise InputError(
            f"An attention mask of {tuple(mask.shape)} doesn't fit a prompt of {len(places)}"
            " positions; if generate was asked for cache_implementation='static', leave that out."
        )
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and bool((mask[~seen] > HIDING_BIAS).any()):
        raise InputError("The model's attention mask adds to scores, which fastvlm can't do.")
    places = places.to(mask.device)
    return seen[places][:, places].cpu()


def blocks_of(seen: Tensor) -> Tensor | None:
    """Return the blocks whose positions see one another, by what each sees: (length, length)."""
    length = len(seen)
    numbers = torch.arange(length)
    last = torch.where(seen, numbers, OUTSIDE).amax(1).tolist()
    found = torch.full((length,), OUTSIDE)
    start = block = 0
    while start < length:
        end = last[start]
        if end > start:
            found[start : end + 1] = block
            block += 1
        start = max(end, start) + 1
    return found if block else None


def expected(kind: MaskKind, row: RowBlocks, length: int) -> Tensor:
    """Return what a row's positions see in layers of a kind: (length, length)."""
    keys = torch.arange(length)
    here = keys[:, None]
    seen = kind.visible(here, keys)
    if row.blocks is not None:
        beside = in_the_same_block(row.blocks[None], row.blocks[None])[0]
        seen = seen | (kind.limited(beside, here, keys) if row.windows_limit_blocks else beside)
    return seen
