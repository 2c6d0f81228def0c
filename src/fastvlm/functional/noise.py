"""Gumbel noise that is a function of a seed, a position and a token, and of nothing else.

The greatest of log p + G, for G of the standard Gumbel distribution, is a draw from p (Gumbel
1954). With noise that both the target and its drafter can look up, a draw is an argmax of each, and
the two agree wherever their distributions nearly do (Daliri et al., arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SEED = 2**64
"""Seeds are below this."""
_LOW_32_BITS = 2**32 - 1


def gumbel(
    seeds: Sequence[int], positions: Sequence[int], tokens: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return noise for some tokens at some positions of replies: (rows, tokens).

    It is a counter-based hash of integers, so any subset of the vocabulary has the same noise as in
    the whole, on every device.

    Args:
        seeds: Each row's seed, from 0 on, below `MAX_SEED`.
        positions: Each row's position in its reply.
        tokens: The tokens, (tokens,), on the device of the noise.
        dtype: The precision of the noise: float32 or float64.
    """
    keys = [_key(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    first, second = (
        torch.tensor(half, dtype=torch.int32, device=tokens.device)[:, None]
        for half in zip(*keys, strict=True)
    )
    # Multiplication wraps around, which is what a hash wants of it.
    bits = _mixed(_mixed(tokens.to(torch.int32) * _signed(0x9E3779B1) ^ first) + second)
    # E = -log(1 - v) is exponential; small v, which decide, are exact in any precision.
    uniform = ((bits & 0x7FFFFFFF).to(dtype) + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def _mixed(x: Tensor) -> Tensor:
    """Return a bijection of 32-bit integers whose every output bit depends on every input bit.

    (The finaliser of MurmurHash3, Appleby 2011.)
    """
    x = (x ^ (x >> 16 & 0xFFFF)) * _signed(0x85EBCA6B)
    x = (x ^ (x >> 13 & 0x7FFFF)) * _signed(0xC2B2AE35)
    return x ^ (x >> 16 & 0xFFFF)


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
