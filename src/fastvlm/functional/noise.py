"""Gumbel noise that is a function of a seed, a position and a token, and of nothing else.

The greatest of log p + G, for G of the standard Gumbel distribution, is a draw from p (Gumbel
1954). With noise that both the target and its drafter can look up, a draw is an argmax of each, and
the two agree wherever their distributions nearly do (Daliri et al., arXiv 2408.07978).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_SEED = 2**64
"""Seeds are below this."""
NEAR = 10.0
"""A score that is so far below another one wins by rare noise only, in one of 22,026 draws."""
BLOCK_TOKENS = 2**16
"""Tokens, of one position or of several, whose random bits are computed at once."""
BLOCK_POSITIONS = 16
"""The most positions of a reply whose random bits are computed at once."""
RARE = int(1.01 * math.exp(-NEAR) * 2**31)
"""Noise is above `NEAR` for uniform numbers below exp(-NEAR) = 4.5e-5: these bits, and a margin."""
_LOW_32_BITS = 2**32 - 1


def gumbel(
    seeds: Sequence[int],
    positions: Sequence[int],
    tokens: Tensor,
    dtype: torch.dtype,
    vocabulary_size: int | None = None,
) -> Tensor:
    """Return noise for some tokens at some positions of replies: (rows, tokens).

    It is a counter-based hash of integers, so any subset of the vocabulary has the same noise as in
    the whole, on every device.

    Args:
        seeds: Each row's seed, from 0 on, below `MAX_SEED`.
        positions: Each row's position in its reply.
        tokens: The tokens, (tokens,), on the device of the noise.
        dtype: The precision of the noise: float32 or float64.
        vocabulary_size: Size of the vocabulary that they are of, for bits that are kept for the
            target's own draws; None where it draws from none.
    """
    at_once = 1 if vocabulary_size is None else _at_once(vocabulary_size)
    if vocabulary_size is None or at_once == 1:
        return _of_bits(_bits(seeds, positions, _spread(tokens)), dtype)
    rows = [
        _noise_block(seed, place // at_once, vocabulary_size, _Held(tokens), dtype)[place % at_once]
        for seed, place in zip(seeds, positions, strict=True)
    ]
    return torch.stack(rows)


def noisy_best(
    scores: Tensor,
    seeds: Sequence[int],
    positions: Sequence[int],
    tokens: Tensor | None = None,
    vocabulary_size: int | None = None,
) -> Tensor:
    """Return each row's argmax of log p + G, as the place of its column: (rows,).

    It is the argmax of `scores + gumbel(...)`. The noise of most tokens is not computed where that
    takes time: with a score that is `NEAR` below what another token reaches, a token can only win
    by noise above `NEAR`, which its bits show.

    Args:
        scores: Log-probabilities, or logits, in at least float32: (rows, tokens).
        seeds: Each row's seed.
        positions: Each row's position in its reply.
        tokens: The tokens of the columns, (tokens,); None for the whole vocabulary.
        vocabulary_size: Size of the vocabulary that those tokens are of.
    """
    size = scores.shape[-1] if tokens is None else vocabulary_size
    bits = _bits_of(seeds, positions, tokens, size or BLOCK_TOKENS, scores.device)
    if scores.device.type != "cpu":
        # Selecting tokens would wait for the device.
        return (scores + _of_bits(bits, scores.dtype)).argmax(-1)
    rows = zip(scores.detach().numpy(), bits.numpy(), strict=True)
    return torch.tensor([_best_of_row(*row) for row in rows])


def _best_of_row(scores: Any, bits: Any) -> int:
    """Return the column of one row, given its bits. See `noisy_best`.

    NumPy selects and computes so few numbers in a fraction of the time of torch's calls.
    """
    best = int(scores.argmax())
    if scores[best] == -math.inf:
        # Where nothing has a chance, it is the first of all.
        return 0
    reached = scores[best] + _noise(bits[best : best + 1], scores.dtype)[0]
    able = np.flatnonzero((scores > reached - NEAR) | (bits < RARE))
    found = scores[able] + _noise(bits[able], scores.dtype)
    return int(able[found.argmax()]) if len(able) else 0


def _noise(bits: Any, dtype: Any) -> Any:
    """Return what `_of_bits` does, of arrays of NumPy."""
    uniform = (bits.astype(dtype) + dtype.type(0.5)) * dtype.type(2.0**-31)
    return -np.log(-np.log1p(-uniform.clip(max=1 - 2.0**-24)))


def _at_once(size: int) -> int:
    """Return of how many positions bits are computed at once, for a vocabulary of a size."""
    return max(min(BLOCK_TOKENS // size, BLOCK_POSITIONS), 1)


def _bits_of(
    seeds: Sequence[int],
    positions: Sequence[int],
    tokens: Tensor | None,
    size: int,
    device: torch.device,
) -> Tensor:
    """Return the random bits of tokens, or of a whole vocabulary of a size: (rows, tokens)."""
    at_once = _at_once(size)
    if at_once == 1:
        spread = _spread_vocabulary(size, device) if tokens is None else _spread(tokens)
        return _bits(seeds, positions, spread)
    # The drafter asks for the same ones before the target does, and both position by position.
    rows = [
        _block(seed, position // at_once, at_once, size, device)[position % at_once]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    whole = torch.stack(rows) if len(rows) > 1 else rows[0][None]
    return whole if tokens is None else whole.index_select(1, tokens)


@lru_cache(maxsize=64)
def _block(seed: int, number: int, length: int, size: int, device: torch.device) -> Tensor:
    """Return the random bits of positions that follow one another: (positions, vocabulary)."""
    positions = range(number * length, (number + 1) * length)
    return _bits([seed] * length, positions, _spread_vocabulary(size, device))


class _Held:
    """Stands for a tensor by its identity, and holds it, so that no other comes to lie there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


@lru_cache(maxsize=64)
def _noise_block(seed: int, number: int, size: int, held: _Held, dtype: torch.dtype) -> Tensor:
    """Return the noise of some tokens at positions that follow one another: (positions, tokens).

    What is rejected is drafted again from the same noise.
    """
    tokens = held.tensor
    return _of_bits(_block(seed, number, _at_once(size), size, tokens.device)[:, tokens], dtype)


def _spread(tokens: Tensor) -> Tensor:
    """Return the first step of the hash, which depends on the tokens alone: (tokens,)."""
    # Multiplication wraps around, which is what a hash wants of it.
    return tokens.to(torch.int32) * _signed(0x9E3779B1)


@lru_cache(maxsize=4)
def _spread_vocabulary(size: int, device: torch.device) -> Tensor:
    return _spread(torch.arange(size, device=device))


def _bits(seeds: Sequence[int], positions: Sequence[int], spread: Tensor) -> Tensor:
    """Return the 31 random bits of tokens, as integers: (rows, tokens)."""
    keys = [_key(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    first, second = (
        torch.tensor(half, dtype=torch.int32, device=spread.device)[:, None]
        for half in zip(*keys, strict=True)
    )
    return _mix(_mix(spread.bitwise_xor(first)).add_(second)).bitwise_and_(0x7FFFFFFF)


def _of_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the noise that 31 random bits make."""
    # E = -log(1 - v) is exponential; small v, which decide, are exact in any precision.
    uniform = (bits.to(dtype) + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def _mix(x: Tensor) -> Tensor:
    """Replace 32-bit integers by a bijection whose every output bit depends on every input bit.

    (The finaliser of MurmurHash3, Appleby 2011.)
    """
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x85EBCA6B))
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(0xC2B2AE35))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _key(seed: int, position: int) -> tuple[int, int]:
    """Return two 32-bit halves of a hash of a seed and a position, signed."""
    found = _mixed_long(_mixed_long(seed) + position)
    return _signed(found & _LOW_32_BITS), _signed(found >> 32)


def _mixed_long(x: int) -> int:
    """Return a bijection of 64-bit integers (SplitMix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % MAX_SEED
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % MAX_SEED
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % MAX_SEED
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """Return a 32-bit number as a signed one."""
    return x - 2**32 if x >= 2**31 else x
