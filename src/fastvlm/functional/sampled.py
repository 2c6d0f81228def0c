"""A few values of a tensor, read without a copy of it."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

GOLDEN_RATIO = 0.618
"""Successive multiples of it, modulo 1, spread as evenly as any."""


def sampled(values: Tensor, number: int) -> Tensor:
    """Return a view of some of a contiguous tensor's values, spread over rows and columns.

    The values lie a fixed number of elements apart: as many rows as make the sample reach about the
    last one, and a part of a row, so that successive values are of other columns.

    Args:
        values: A contiguous tensor of any shape.
        number: The most values.

    Returns:
        (at most `number`,), fewer only of tensors that have fewer, or few rows more than that.
    """
    return values.as_strided(*spread(values.shape, number))


@lru_cache(maxsize=1024)
def spread(shape: tuple[int, ...], number: int) -> tuple[tuple[int], tuple[int]]:
    """Return size and stride of the view that `sampled` takes of a tensor of a shape."""
    total, columns = 1, shape[-1] if shape else 1
    for size in shape:
        total *= size
    if total <= number:
        return (total,), (1,)
    even = total // number
    # Odd parts of a row, as numbers of columns are mostly even: every column has its turn.
    if even < columns:
        stride = even - 1 + even % 2
    else:
        rows = round(even / columns - GOLDEN_RATIO)
        stride = rows * columns + (round(GOLDEN_RATIO * columns) | 1)
    return (min(number, (total - 1) // stride + 1),), (stride,)
