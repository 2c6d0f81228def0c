"""Kernels for a GPU, in Triton: what stands between the matrix products of a decoder layer.

A step of a decoder is a chain of products with one row, and between them a few dozen operators on
a few thousand numbers, each of which a GPU takes longer to begin than to compute. These do the same
in six kernels a layer. In 16 bits they round where the models' own operators do.

Rows attend to the keys and values in the slots of the cache where they lie, each as far as its own
position, which the kernels read on the device: one recorded graph serves every length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WARPS = 8
PROGRAMS = 512
"""Programs of attention that keep any GPU busy: keys are split among them."""
MAX_SPLITS = 32
KEYS_AT_ONCE = 32
"""Keys that a program of attention multiplies together."""
MIN_ROWS, MAX_ROWS = 16, 64
"""Queries that a program of attention multiplies together: a matrix unit takes no fewer than 16."""
GATED_BLOCK = 1024
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
"""The activations of gated feed-forward parts that `gated` computes."""


class CacheRows(NamedTuple):
    """Where rows lie in a cache.

    Args:
        slots: The slot of each row: (batch,).
        starts: Its first position in this pass: (batch,).
    """

    slots: Tensor
    starts: Tensor


@triton.jit
def _rms_norm(
    x: Any,
    added: Any,
    weight: Any,
    total: Any,
    out: Any,
    size: Any,
    eps: Any,
    ADDS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    dtype = out.dtype.element_ty
    values = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(added + row + column, mask=inside, other=0.0).to(tl.float32)
        values = values.to(dtype).to(tl.float32)
        tl.store(total + row + column, values.to(dtype), mask=inside)
    own = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    values = values * tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    values = values * (1.0 + own) if UNIT_OFFSET else values.to(dtype).to(tl.float32) * own
    tl.store(out + row + column, values.to(dtype), mask=inside)


@triton.jit
def _rotated(one: Any, other: Any, cos: Any, sin: Any, dtype: tl.constexpr) -> Any:
    return ((one * cos).to(dtype).to(tl.float32) + (other * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _rotate_and_store(
    queries: Any,
    keys: Any,
    values: Any,
    cos: Any,
    sin: Any,
    key_cache: Any,
    value_cache: Any,
    slots: Any,
    starts: Any,
    width: Any,
    heads: Any,
    kv_heads: Any,
    size: Any,
    slot_stride: Any,
    head_stride: Any,
    position_stride: Any,
    BLOCK: tl.constexpr,
) -> None:
    place, head = tl.program_id(0), tl.program_id(1)
    row = place // width
    half = size // 2
    column = tl.arange(0, BLOCK)
    inside = column < half
    position = tl.load(starts + row).to(tl.int64) + place % width
    written = tl.load(slots + row).to(tl.int64) * slot_stride + position * position_stride
    dtype = key_cache.dtype.element_ty
    if head >= heads + kv_heads:
        own = head - heads - kv_heads
        source = values + (place * kv_heads + own) * size + column
        target = value_cache + written + own * head_stride + column
        tl.store(target, tl.load(source, mask=inside, other=0.0), mask=inside)
        second = tl.load(source + half, mask=inside, other=0.0)
        tl.store(target + half, second, mask=inside)
    else:
        if head < heads:
            source = queries + (place * heads + head) * size + column
            target = source
        else:
            own = head - heads
            source = keys + (place * kv_heads + own) * size + column
            target = key_cache + written + own * head_stride + column
        one = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        angle = place * size + column
        first_cos = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        first_sin = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        second_cos = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
        second_sin = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, _rotated(one, -other, first_cos, first_sin, dtype), mask=inside)
        tl.store(target + half, _rotated(other, one, second_cos, second_sin, dtype), mask=inside)


@triton.jit
def _attend_to_a_part(
    queries: Any,
    key_cache: Any,
    value_cache: Any,
    slots: Any,
    starts: Any,
    parts: Any,
    greatest: Any,
    sums: Any,
    scale: Any,
    width: Any,
    groups: Any,
    kv_heads: Any,
    size: Any,
    window: Any,
    slot_stride: Any,
    head_stride: Any,
    position_stride: Any,
    WINDOWED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    start = tl.load(starts + batch).to(tl.int64)
    end = start + width
    first = start * 0
    if WINDOWED:
        first = tl.maximum(start - window + 1, 0)
    chunk = tl.cdiv(tl.cdiv(end - first, SPLITS), KEYS) * KEYS
    begin = first + split * chunk
    stop = tl.minimum(begin + chunk, end)
    # The rows of one head of keys: all queries that share it, at all positions of the pass.
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    exists = row < width * groups
    position = start + row // groups
    query = (batch * width + row // groups) * (kv_heads * groups) + kv_head * groups + row % groups
    column = tl.arange(0, BLOCK)
    inside = column < size
    own = tl.load(
        queries + query[:, None] * size + column[None, :],
        mask=exists[:, None] & inside[None, :],
        other=0.0,
    )
    held = tl.load(slots + batch).to(tl.int64) * slot_stride + kv_head * head_stride
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, BLOCK), tl.float32)
    for key_start in range(begin, stop, KEYS):
        key = key_start + tl.arange(0, KEYS)
        within = key < stop
        offset = held + key[:, None] * position_stride + column[None, :]
        readable = within[:, None] & inside[None, :]
        some_keys = tl.load(key_cache + offset, mask=readable, other=0.0)
        scores = tl.dot(own, tl.trans(some_keys), input_precision="ieee") * scale
        seen = within[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(best, tl.max(scores, axis=1))
        # A row that has seen no key yet must not take infinity from infinity.
        finite = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - finite[:, None])
        kept = tl.exp(best - finite)
        total = total * kept + tl.sum(weights, axis=1)
        some_values = tl.load(value_cache + offset, mask=readable, other=0.0)
        more = tl.dot(weights.to(some_values.dtype), some_values, input_precision="ieee")
        found = found * kept[:, None] + more
        best = now
    part = query * SPLITS + split
    tl.store(greatest + part, best, mask=exists)
    tl.store(sums + part, total, mask=exists)
    tl.store(
        parts + part[:, None] * size + column[None, :],
        found,
        mask=exists[:, None] & inside[None, :],
    )


@triton.jit
def _join_parts(
    parts: Any,
    greatest: Any,
    sums: Any,
    out: Any,
    size: Any,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    query = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    part = query * SPLITS + tl.arange(0, SPLITS)
    best = tl.load(greatest + part)
    weights = tl.exp(best - tl.max(best, axis=0))
    total = tl.sum(weights * tl.load(sums + part), axis=0)
    found = tl.load(parts + part[:, None] * size + column[None, :], mask=inside[None, :], other=0.0)
    joined = tl.sum(found * weights[:, None], axis=0) / total
    tl.store(out + query * size + column, joined.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated(
    gate: Any, up: Any, out: Any, size: Any, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    dtype = out.dtype.element_ty
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        active = x / (1.0 + tl.exp(-x))
    else:
        # tanh(u) is 2 / (1 + exp(-2 u)) - 1.
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        active = x / (1.0 + tl.exp(-2.0 * inner))
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (active.to(dtype).to(tl.float32) * other).to(dtype), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (..., size) states and their norms; with what is added to them first, if anything.

    Args:
        x: The states, contiguous: (..., size).
        weight: (size,).
        eps: What is added to a mean square.
        added: As many states, contiguous.
        unit_offset: Whether norms are multiplied by 1 + weight, as Gemma's are.
    """
    size = x.shape[-1]
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _rms_norm[(x.numel() // size,)](
        x,
        x if added is None else added,
        weight,
        total,
        out,
        size,
        eps,
        ADDS=added is not None,
        UNIT_OFFSET=unit_offset,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), MAX_WARPS),
    )
    return total, out


def rotate_and_store(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotations: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    rows: CacheRows,
) -> None:
    """Rotate queries where they are, and write rotated keys, and values, into a cache.

    Args:
        queries: (batch, width, heads, size), contiguous, as the others.
        keys: (batch, width, kv_heads, size).
        values: (batch, width, kv_heads, size).
        rotations: Cosines and sines: (batch, width, size) each, contiguous.
        held: Keys and values of the cache, of equal strides: (slots, kv_heads, capacity, size)
            each.
        rows: Where the rows lie in it.
    """
    batch, width, heads, size = queries.shape
    kv_heads = keys.shape[2]
    _rotate_and_store[(batch * width, heads + 2 * kv_heads)](
        queries,
        keys,
        values,
        *rotations,
        *held,
        *rows,
        width,
        heads,
        kv_heads,
        size,
        *held[0].stride()[:3],
        BLOCK=triton.next_power_of_2(size // 2),
        num_warps=1,
    )


def attention(
    queries: Tensor,
    held: tuple[Tensor, Tensor],
    rows: CacheRows,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return what positions attend to in a cache that holds their own keys: as `queries`.

    Args:
        queries: (batch, width, heads, size), contiguous.
        held: Keys and values of the cache, of equal strides: (slots, kv_heads, capacity, size)
            each.
        rows: Where the rows lie in it.
        scale: What scores are multiplied by.
        window: The last positions that each sees, its own included; None for all up to its own.
    """
    batch, width, heads, size = queries.shape
    kv_heads = held[0].shape[1]
    groups = heads // kv_heads
    together = triton.next_power_of_2(width * groups)
    tiles_of = min(max(together, MIN_ROWS), MAX_ROWS)
    tiles = triton.cdiv(width * groups, tiles_of)
    splits = triton.next_power_of_2(PROGRAMS // (batch * kv_heads * tiles) or 1)
    splits = min(splits, MAX_SPLITS)
    number = batch * width * heads
    parts = queries.new_empty(number, splits, size, dtype=torch.float32)
    greatest, sums = queries.new_empty(2, number, splits, dtype=torch.float32)
    block = max(triton.next_power_of_2(size), 16)
    _attend_to_a_part[(batch * kv_heads, splits, tiles)](
        queries,
        *held,
        *rows,
        parts,
        greatest,
        sums,
        scale,
        width,
        groups,
        kv_heads,
        size,
        window or 0,
        *held[0].stride()[:3],
        WINDOWED=window is not None,
        SPLITS=splits,
        ROWS=tiles_of,
        KEYS=KEYS_AT_ONCE,
        BLOCK=block,
        num_warps=4,
    )
    out = torch.empty_like(queries)
    _join_parts[(number,)](
        parts, greatest, sums, out, size, SPLITS=splits, BLOCK=block, num_warps=1
    )
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up, of any shape; the name is one of `ACTIVATIONS`."""
    out = torch.empty_like(gate)
    size = out.numel()
    _gated[(triton.cdiv(size, GATED_BLOCK),)](
        gate, up, out, size, ACTIVATION=ACTIVATIONS[activation], BLOCK=GATED_BLOCK
    )
    return out
