"""Weights in 8 and 4 bits, in the layout of ONNX Runtime's `MatMulNBits`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCKS = {8: 64, 4: 32}
"""Weights of a row, side by side, that share a scale, and an offset where there are 4 bits: by the
bits. Larger blocks are multiplied faster. With 8 bits, 64 lose 0.001 of Gemma 3 270M's
log-likelihood a token beside 32, and 128 lose 0.018."""
BITS = {"int8": 8, "int4": 4}
"""The forms of weights by name, and the bits of a weight."""


class QuantisedWeight(NamedTuple):
    """A matrix of whole numbers with a scale for each block of a row, see `BLOCKS`.

    Args:
        values: (outputs, blocks, bytes of a block), unsigned.
        scales: (outputs, blocks).
        zeros: What stands for 0 in each block, in as many bits: (outputs, bytes of a row). None
            where it is 2^(bits - 1) in all.
        bits: Bits of a weight: two share a byte where it has 4, the first in the lower half.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    def dense(self, inputs: int) -> Tensor:
        """Return what the weights stand for: (outputs, inputs)."""
        if self.zeros is None:
            offset = self.values.new_full((1, 1), 2 ** (self.bits - 1))
            values = self.values
        else:
            offset = _halves(self.zeros)[:, : self.scales.shape[1]]
            values = _halves(self.values)
        whole = (values.float() - offset[..., None].float()) * self.scales[..., None]
        return whole.flatten(1)[:, :inputs]


class QuantisedMatrices:
    """Matrices in 8 or 4 bits, each rounded once, for graphs that have some in common.

    Args:
        bits: 8 or 4.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._made: dict[tuple[int, torch.Size], tuple[QuantisedWeight, Tensor]] = {}
        """By where they lie, where they stay."""

    def of(self, weight: Tensor) -> QuantisedWeight:
        """Return a matrix, (outputs, inputs), in fewer bits."""
        key = weight.data_ptr(), weight.shape
        if key not in self._made:
            self._made[key] = quantise(weight, self.bits), weight
        return self._made[key][0]


def quantise(weight: Tensor, bits: int) -> QuantisedWeight:
    """Round a matrix to 8 or 4 bits, block by block.

    With 8 bits a block's weight of the greatest size is the lowest whole number, of which there is
    one more than of positive ones. With 4 the whole numbers reach from a block's lowest weight to
    its highest, or to 0.

    Args:
        weight: (outputs, inputs).
        bits: 8 or 4.
    """
    size = BLOCKS[bits]
    padded = F.pad(weight.float(), (0, -weight.shape[1] % size))
    blocks = padded.unflatten(1, (-1, size))
    if bits == BITS["int4"]:
        return _in_4_bits(blocks)
    places = blocks.abs().argmax(-1, keepdim=True)
    zero = 2 ** (bits - 1)
    scales = blocks.gather(-1, places) / -zero
    whole = _divided(blocks, scales).round() + zero
    values = whole.clamp(0, 2 * zero - 1).to(torch.uint8)
    return QuantisedWeight(values.contiguous(), scales[..., 0].contiguous(), None, bits)


def _in_4_bits(blocks: Tensor) -> QuantisedWeight:
    """Return blocks, (outputs, blocks, weights of a block), in 4 bits. See `quantise`."""
    most = 15
    low, high = (found.clamp(*to) for found, to in zip(blocks.aminmax(dim=-1), _SIDES, strict=True))
    scales = ((high - low) / most)[..., None]
    zeros = _divided(-low[..., None], scales).round()
    values = (_divided(blocks, scales).round() + zeros).clamp(0, most).to(torch.uint8)
    zeros = F.pad(zeros[..., 0], (0, zeros.shape[1] % 2)).to(torch.uint8)
    return QuantisedWeight(_paired(values), scales[..., 0].contiguous(), _paired(zeros), 4)


_SIDES: tuple[tuple[float | None, float | None], ...] = ((None, 0.0), (0.0, None))
"""Within what a block's lowest weight and its highest lie, as it has to have a 0."""


def _divided(x: Tensor, scales: Tensor) -> Tensor:
    """Return `x` in units of scales; 0 where a scale is."""
    return torch.where(scales == 0, 0, x / torch.where(scales == 0, 1, scales))


def _paired(values: Tensor) -> Tensor:
    """Return numbers of 4 bits two to a byte, along the last axis."""
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _halves(values: Tensor) -> Tensor:
    """Return the numbers of 4 bits in bytes, along the last axis."""
    return torch.stack((values & 15, values >> 4), -1).flatten(-2)
