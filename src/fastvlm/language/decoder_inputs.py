"""What a prompt is to a decoder."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

UNKNOWN_TOKEN = -1
"""Stands for a prompt's token where only its embedding was given."""
OUTSIDE = -1
"""The block of a position that is in none."""


@dataclass(frozen=True, slots=True)
class DecoderInputs:
    """One prompt as a decoder takes it, without padding.

    Args:
        token_ids: Its tokens, a placeholder for each visual token; `UNKNOWN_TOKEN` where a model
            was given embeddings alone. For an encoder-decoder they are the decoder's.
        embeddings: What the decoder is given for them: (length, d_embedding).
        position_ids: Where each position is: (1, length), or time, height and width for a model
            that tells them apart, (3, length). A reply counts on from the greatest. None for 0, 1,
            2 ...
        encoder_states: What cross-attention attends to, (source, d_model): an encoder-decoder's
            encoded source, or images; None for a model without cross-attention.
        source_visible: Which of these each position sees, (length, source); a reply sees what the
            last position does. None for all.
        blocks: The bidirectional block that each position is in, `OUTSIDE` for none: (length,).
            The positions of a block, which lie side by side, see one another. None for a causal
            prompt.
        windows_limit_blocks: Whether a layer's window limits what positions see of their block.
        injections: What is added to the hidden states after a layer, by the layer's number, as
            DeepStack does: (length, d_model) each; -1 stands for before the first layer.
        keys: What tells each position from others in the prefix cache: its token, or its image and
            the number of the visual token. None for a prompt that is never looked up or kept.
    """

    token_ids: list[int]
    embeddings: Tensor
    position_ids: Tensor | None = None
    encoder_states: Tensor | None = None
    source_visible: Tensor | None = None
    blocks: Tensor | None = None
    windows_limit_blocks: bool = False
    injections: Mapping[int, Tensor] = field(default_factory=dict)
    keys: list[Hashable] | None = None

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.token_ids)

    @property
    def is_plain(self) -> bool:
        """Whether a position is its number, sees all before it alone, and is given nothing else."""
        return self.position_ids is None and self.blocks is None and not self.injections

    def with_keys(self, keys: Sequence[Hashable]) -> DecoderInputs:
        """Return the same prompt with keys for the prefix cache, see `keys`.

        The states of a block's positions depend on all of the block, and so do their keys.
        """
        return replace(self, keys=list(_with_blocks(keys, self.blocks)))

    def chunk_end(self, start: int, most: int) -> int:
        """Return where a chunk of the prompt ends that is computed in one pass.

        A block is never cut, as its positions see one another: a chunk ends before a block that
        doesn't fit, or holds more than `most` positions where it begins with one.

        Args:
            start: The chunk's first position.
            most: Positions that it should have at most.
        """
        end = min(start + most, len(self))
        if self.blocks is None or end == len(self):
            return end
        block = int(self.blocks[end])
        if block == OUTSIDE or int(self.blocks[end - 1]) != block:
            return end
        inside = torch.nonzero(self.blocks == block)
        first, last = int(inside[0]), int(inside[-1])
        return first if first > start else last + 1


def _with_blocks(keys: Sequence[Hashable], blocks: Tensor | None) -> Iterator[Hashable]:
    if blocks is None:
        yield from keys
        return
    pairs: Any = zip(keys, blocks.tolist(), strict=True)
    for block, members in groupby(pairs, key=lambda pair: pair[1]):
        own = [key for key, _ in members]
        if block == OUTSIDE:
            yield from own
            continue
        whole = blake2b(repr(own).encode(), digest_size=16).digest()
        yield from ((whole, number) for number in range(len(own)))
