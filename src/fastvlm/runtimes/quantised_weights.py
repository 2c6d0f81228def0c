"""Weights in 8 and 4 bits, in the layout of ONNX Runtime's `MatMulNBits`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 32
"""Weights of a row, side by side, that share a scale."""
BITS = {"int8": 8, "int4": 4}
"""The forms of weights by name, and the bits of a weight."""


class QuantisedWeight(NamedTuple):
    """A matrix of whole numbers with a scale for each block of `BLOCK` in a row.

    Args:
        values: (outputs, blocks, bytes of a block), unsigned; 2^(bits - 1) stands for 0.
        scales: (outputs, blocks).
        bits: Bits of a weight: two share a byte where it has 4, the first in the lower half.
    """

    values: Tensor
    scales: Tensor
    bits: int

    def dense(self, inputs: int) -> Tensor:
        """Return what the weights stand for: (outputs, inputs)."""
        values = self.values
        if self.bits == BITS["int4"]:
            values = torch.stack((values & 15, values >> 4), -1).flatten(-2)
        whole = (values.float() - 2 ** (self.bits - 1)) * self.scales[..., None]
        return whole.flatten(1)[:, :inputs]


def quantise(weight: Tensor, bits: int) -> QuantisedWeight:
    """Round a matrix to 8 or 4 bits, block by block.

    A block's weight of the greatest size is the lowest whole number, of which there is one more
    than of positive ones.

    Args:
        weight: (outputs, inputs).
        bits: 8 or 4.
    """
    padded = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK))
    places = blocks.abs().argmax(-1, keepdim=True)
    zero = 2 ** (bits - 1)
    scales = blocks.gather(-1, places) / -zero
    whole = torch.where(scales == 0, 0, blocks / torch.where(scales == 0, 1, scales))
    values = (whole.round() + zero).clamp(0, 2 * zero - 1).to(torch.uint8)
    if bits == BITS["int4"]:
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    return QuantisedWeight(values.contiguous(), scales[..., 0].contiguous(), bits)
