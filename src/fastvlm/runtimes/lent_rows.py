"""The memory of the cache that a pass reads and writes, lent to another runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlm.language.cache import DecoderCache
from fastvlm.language.positions import Positions


class Lent(NamedTuple):
    """Where the layers of a pass read and write.

    Args:
        caches: Keys and values of each layer by turns, contiguous: (slots, kv_heads, capacity,
            head_dim).
        rows: The slots of the pass.
        memory: Stands for where these lie: another object where they lie elsewhere.
        write_back: What must be called after the pass.
    """

    caches: list[Tensor]
    rows: slice
    memory: object
    write_back: Callable[[], None]


def lend_rows(
    cache: DecoderCache,
    positions: Positions,
    layers: Sequence[tuple[int, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> Lent:
    """Lend layers what a pass reads and writes of a cache, in float32.

    Rows that lie side by side are lent where they are; others, and those in 16 bits, are copied,
    and what is written to the copies is then written back.

    Args:
        cache: The cache.
        positions: Of the pass.
        layers: Each layer's number in the cache, and keys of its shape.
        dtype: The precision of layers that have written nothing yet.
    """
    cache.begin_pass(positions)
    rows = cache.rows
    own: list[Tensor] = []
    for number, like in layers:
        storage = cache.layers.get(number)
        if storage is None:
            keys = like.to(dtype)
            storage = cache.storage(number, keys, keys)
        storage.make_finite(positions)
        own += storage.keys, storage.values
    exact = own[0].dtype == torch.float32
    if exact and type(rows) is slice:
        return Lent(own, rows, cache.memory, _nothing)
    # In 16 bits all rows are copied, and so no further than is read.
    seen = slice(None) if exact else slice(cache.rounded(positions.end))
    copies = [tensor[rows, :, seen].float() for tensor in own]

    def write_back() -> None:
        index, places = positions.rows(cache.device), positions.indices
        each = torch.arange(len(index))[:, None]
        for tensor, copied in zip(own, copies, strict=True):
            tensor[index, :, places] = copied[each, :, places].to(tensor.dtype)

    return Lent(copies, slice(0, len(positions.slots)), object(), write_back)


def _nothing() -> None:
    pass
