"""Which keys each kind of layer sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvlm.language.decoder_inputs import OUTSIDE


class MaskKind(NamedTuple):
    """What a layer's attention sees of the positions up to its own.

    Args:
        window: The last positions, its own included; None for no window.
        chunk: The positions of the same chunk, of which each has so many; None for no chunks.
        kept: The last positions that the cache of `transformers` keeps for those of a reply, though
            its mask lets them see all; a prompt's see all. None for all.
    """

    window: int | None = None
    chunk: int | None = None
    kept: int | None = None

    def is_whole(self, length: int) -> bool:
        """Return whether all of so many positions are seen."""
        return all(size is None or length <= size for size in self)

    def visible(self, here: Tensor, keys: Tensor) -> Tensor:
        """Return which keys are seen, for positions and keys that broadcast."""
        return self.limited(keys <= here, here, keys)

    def limited(self, seen: Tensor, here: Tensor, keys: Tensor) -> Tensor:
        """Return what is left of visible keys within the window and the chunk."""
        if self.window is not None:
            seen = seen & (keys > here - self.window)
        if self.chunk is not None:
            seen = seen & (keys // self.chunk == here // self.chunk)
        return seen


FULL = MaskKind()


def in_the_same_block(here: Tensor, keys: Tensor) -> Tensor:
    """Return which keys are in a position's own bidirectional block.

    Args:
        here: The blocks of positions: (batch, width).
        keys: The blocks of keys: (batch, end).

    Returns:
        (batch, width, end).
    """
    return (here[..., None] == keys[:, None]) & (here != OUTSIDE)[..., None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to attention scores: 0 where `seen` holds, in the shape of `seen`."""
    # The least number rather than minus infinity: a row that sees nothing stays finite.
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
