"""Convolutions with parallel branches, which fold into one for inference.

`reparameterize` folds the branches (arXiv 2206.04040, section 3.1); a `ConvNorm` folds its
BatchNorm. Both are exact up to rounding, and need the running statistics of evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fold_norm(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the convolution equal to a convolution followed by a BatchNorm.

    Args:
        weight: (out, in / groups, k, k).
        bias: (out,), or None for zero.
        norm: The BatchNorm, read as in evaluation.
    """
    assert norm.running_mean is not None  # all of ours track
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    return weight * scale[:, None, None, None], shift if bias is None else shift + bias * scale


def identity_kernel(channels: int, groups: int, size: int, like: Tensor) -> Tensor:
    """Return the (channels, channels / groups, size, size) kernel that copies its input."""
    per_group = channels // groups
    kernel = like.new_zeros(channels, per_group, size, size)
    index = torch.arange(channels, device=like.device)
    kernel[index, index % per_group, size // 2, size // 2] = 1
    return kernel


def pad_kernel(kernel: Tensor, size: int) -> Tensor:
    """Return an odd kernel centred in zeros of (size, size)."""
    margin = (size - kernel.shape[-1]) // 2
    return F.pad(kernel, (margin, margin, margin, margin))


class ConvNorm(nn.Module):
    """A convolution without bias and its BatchNorm; one biased convolution once folded."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=folded
        )
        self.bn = None if folded else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.bn is None else self.bn(x)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Return the weight and bias of the one convolution that this layer equals."""
        assert self.bn is not None  # only training and reparameterized forms ask
        return fold_norm(self.conv.weight, self.conv.bias, self.bn)

    def fold(self) -> None:
        """Fold the BatchNorm into the convolution."""
        if self.bn is None:
            return
        weight, bias = self.kernel()
        self.conv.weight.data, self.conv.bias = weight.data, nn.Parameter(bias.data)
        self.bn = None


class SqueezeExcite(nn.Module):
    """Channel attention from the global average (Hu et al. 2018), reduction 16."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * scale.sigmoid()


@dataclass(frozen=True, slots=True)
class Branches:
    """The branches that a `RepConv` sums in training.

    Args:
        full: Whether there is a convolution of the full kernel.
        small: The kernel size of a second convolution: MobileOne's 1x1 scale branch, or the 3x3 one
            beside a large kernel; None for none.
        identity: Whether there is a BatchNorm of the input itself, which needs as many output
            channels as input channels and stride 1.
    """

    full: bool = True
    small: int | None = None
    identity: bool = False


FULL = Branches()


class RepConv(nn.Module):
    """Parallel branches summed, then optional channel attention and GELU; one convolution fused.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Side of the kernel.
        stride: Stride.
        groups: Groups of channels.
        branches: What is summed in training.
        after: What follows the sum: `gelu`, `squeeze-excite` (and then GELU), or `nothing`.
        form: `training` for branches, another form for one convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        branches: Branches = FULL,
        after: Literal["gelu", "squeeze-excite", "nothing"] = "gelu",
        form: str = "training",
    ) -> None:
        super().__init__()
        self.size, self.stride, self.groups = kernel, stride, groups
        self.conv = self.branch = self.identity = self.reparam = None
        if form == "training":
            if branches.full:
                self.conv = ConvNorm(inputs, outputs, kernel, stride=stride, groups=groups)
            if branches.small:
                small = branches.small
                self.branch = ConvNorm(inputs, outputs, small, stride=stride, groups=groups)
            if branches.identity:
                self.identity = nn.BatchNorm2d(inputs)
        else:
            self.reparam = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        self.se = SqueezeExcite(outputs) if after == "squeeze-excite" else None
        self.act = None if after == "nothing" else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam is not None:
            out = self.reparam(x)
        else:
            parts = [
                part(x) for part in (self.conv, self.branch, self.identity) if part is not None
            ]
            out = sum(parts[1:], parts[0])
        if self.se is not None:
            out = self.se(out)
        return out if self.act is None else self.act(out)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Return the weight and bias of the one convolution that the branches sum to."""
        if self.reparam is not None:
            assert self.reparam.bias is not None
            return self.reparam.weight, self.reparam.bias
        kernels = []
        for part in (self.conv, self.branch):
            if part is not None:
                weight, bias = part.kernel()
                kernels.append((pad_kernel(weight, self.size), bias))
        if self.identity is not None:
            channels = self.identity.num_features
            copy = identity_kernel(channels, self.groups, self.size, self.identity.weight)
            kernels.append(fold_norm(copy, None, self.identity))
        weights, biases = zip(*kernels, strict=True)
        return torch.stack(weights).sum(0), torch.stack(biases).sum(0)

    def reparameterize(self) -> None:
        """Fold the branches into `reparam`."""
        if self.reparam is not None:
            return
        weight, bias = self.kernel()
        outputs, per_group = weight.shape[:2]
        self.reparam = folded_conv(weight, bias, per_group * self.groups, outputs, self)
        self.conv = self.branch = self.identity = None


def folded_conv(
    weight: Tensor, bias: Tensor, inputs: int, outputs: int, like: RepConv
) -> nn.Conv2d:
    """Return a convolution with these weights and another's kernel size, stride and groups."""
    conv = nn.Conv2d(
        inputs, outputs, like.size, like.stride, like.size // 2, groups=like.groups, device="meta"
    )
    conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return conv
