"""The layers of FastViTHD, each of which can fold itself for inference.

Every layer is built in one of the three forms of `FastViTHDConfig.form`. `reparameterize` folds a
layer's parallel branches into one convolution; `fold` then folds the BatchNorm and the layer scales
that are left. Both are exact up to rounding, and both need the running statistics of evaluation.
Layers map (batch, `inputs`, height, width) to (batch, `outputs`, ...), or keep `width` channels;
`ratio` and `layer_scale` are `mlp_ratio` and `layer_scale_init` of `FastViTHDConfig`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.functional.packed import PackedWeight, may_pack_weight
from fastvlm.functional.products import OneDnnProduct, available, product_of_many
from fastvlm.vision.convolutions import (
    Branches,
    ConvNorm,
    RepConv,
    folded_conv,
    identity_kernel,
)

FFN_CHUNK_VALUES = 2**21
"""The number of hidden values of a feed-forward network that are computed at a time."""
gelu_ = torch.ops.aten.gelu_
"""GELU in place, which `torch.nn.functional` has no name for."""


class LayerScale(nn.Module):
    """A learned factor for each channel of (batch, channels, height, width)."""

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RepMixer(nn.Module):
    """FastViT's token mixer: x + scale * (mixer(x) - norm(x)), one depthwise 3x3 when fused."""

    def __init__(self, width: int, layer_scale: float, form: str) -> None:
        super().__init__()
        self.norm = self.mixer = self.layer_scale = self.reparam = None
        if form == "training":
            norm, mixer = Branches(full=False, identity=True), Branches(small=1, identity=True)
            self.norm = RepConv(width, width, 3, groups=width, branches=norm, after="nothing")
            self.mixer = RepConv(width, width, 3, groups=width, branches=mixer, after="nothing")
            self.layer_scale = LayerScale(width, layer_scale)
        else:
            self.reparam = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam is not None:
            return self.reparam(x)
        assert self.mixer is not None
        assert self.norm is not None
        assert self.layer_scale is not None
        return x + self.layer_scale(self.mixer(x) - self.norm(x))

    def reparameterize(self) -> None:
        """Fold the mixer, its norm, the layer scale and the residual into `reparam`."""
        if self.reparam is not None:
            return
        assert self.mixer is not None
        assert self.norm is not None
        assert self.layer_scale is not None
        mixer_weight, mixer_bias = self.mixer.kernel()
        norm_weight, norm_bias = self.norm.kernel()
        gamma = self.layer_scale.gamma
        width = len(gamma)
        copy = identity_kernel(width, width, 3, mixer_weight)
        weight = copy + gamma[..., None] * (mixer_weight - norm_weight)
        bias = gamma.flatten() * (mixer_bias - norm_bias)
        self.reparam = folded_conv(weight, bias, width, width, self.mixer)
        self.norm = self.mixer = self.layer_scale = None


class PackedFfn(NamedTuple):
    """Both products of a `ConvFFN`, packed."""

    first: PackedWeight[OneDnnProduct]
    second: PackedWeight[OneDnnProduct]


class ConvFFN(nn.Module):
    """A 7x7 depthwise convolution and BatchNorm, then 1x1, GELU, 1x1."""

    packed: PackedFfn | None = None
    """The products of inference on a CPU, where `pack` has been called."""

    def __init__(self, width: int, ratio: int, form: str) -> None:
        super().__init__()
        self.conv = ConvNorm(width, width, 7, groups=width, folded=form == "fused")
        self.fc1 = nn.Conv2d(width, width * ratio, 1)
        self.fc2 = nn.Conv2d(width * ratio, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution is a product over the channels, which lie side by side in channels_last;
        # as one, its weights need no other order at each call.
        tokens = self.conv(x).permute(0, 2, 3, 1)
        if tokens.device.type == "cpu" and torch.is_inference_mode_enabled():
            return self.in_pieces(tokens).permute(0, 3, 1, 2)
        hidden = F.gelu(F.linear(tokens, self.fc1.weight.flatten(1), self.fc1.bias))
        return F.linear(hidden, self.fc2.weight.flatten(1), self.fc2.bias).permute(0, 3, 1, 2)

    def in_pieces(self, tokens: Tensor) -> Tensor:
        """Compute the same for some positions at a time, so that what is between stays in caches.

        Args:
            tokens: (batch, height, width, channels).
        """
        first, second = self.fc1.weight.flatten(1).t(), self.fc2.weight.flatten(1).t()
        assert self.fc1.bias is not None
        assert self.fc2.bias is not None
        flat, packed = tokens.reshape(-1, tokens.shape[-1]), self._current()
        out = torch.empty_like(flat)
        rows = max(1, FFN_CHUNK_VALUES // first.shape[1])
        for piece, result in zip(flat.split(rows), out.split(rows), strict=True):
            if packed is None:
                hidden = torch.addmm(self.fc1.bias, piece, first)
                torch.addmm(self.fc2.bias, gelu_(hidden), second, out=result)
            else:
                hidden = packed.first.product.gelu(piece, self.fc1.bias)
                result.copy_(packed.second.product(hidden, self.fc2.weight, self.fc2.bias))
        return out.view(tokens.shape)

    def pack(self, most_bytes: int) -> int:
        """Lay out the weights for inference on a CPU; return the bytes that it takes.

        They are left alone where that doesn't pay, or takes more than `most_bytes`.
        """
        weights = self.fc1.weight, self.fc2.weight
        self.packed = None
        if sum(weight.nbytes for weight in weights) > most_bytes or not available():
            return 0
        if not all(map(may_pack_weight, weights)):
            return 0
        first, second = (PackedWeight.of(weight, product_of_many) for weight in weights)
        if first is None or second is None:
            return 0
        self.packed = PackedFfn(first, second)
        return first.product.nbytes + second.product.nbytes

    def _current(self) -> PackedFfn | None:
        """Return what was packed, unless weights have changed since or autocast casts them."""
        packed = self.packed
        if packed is None or torch.is_autocast_enabled("cpu"):
            return None
        if packed.first.is_of(self.fc1.weight) and packed.second.is_of(self.fc2.weight):
            return packed
        self.packed = None
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what was packed."""
        state = vars(self).copy()
        state.pop("packed", None)
        return state


class SelfAttention(nn.Module):
    """Multi-head self-attention over the positions of (batch, channels, height, width)."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        # Side by side, as they lie in channels_last, they are one product's rows.
        tokens = x.permute(0, 2, 3, 1).reshape(batch, -1, width)
        qkv = self.qkv(tokens).view(batch, tokens.shape[1], 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.proj(mixed.transpose(1, 2).reshape(batch, -1, width))
        return mixed.transpose(1, 2).reshape(batch, width, height, columns)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, height, width)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _fold_scale(linear: nn.Linear | nn.Conv2d, scale: LayerScale) -> None:
    """Multiply a layer's outputs by a layer scale for good."""
    gamma = scale.gamma.detach().flatten()
    assert linear.bias is not None
    linear.weight.data = linear.weight.data * gamma.view(-1, *[1] * (linear.weight.dim() - 1))
    linear.bias.data = linear.bias.data * gamma


class MixerBlock(nn.Module):
    """A block of stages 1 to 3: RepMixer, then the feed-forward network."""

    def __init__(self, width: int, ratio: int, layer_scale: float, form: str) -> None:
        super().__init__()
        self.token_mixer = RepMixer(width, layer_scale, form)
        self.mlp = ConvFFN(width, ratio, form)
        self.layer_scale = None if form == "fused" else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        out = self.mlp(x)
        return x + (out if self.layer_scale is None else self.layer_scale(out))

    def fold(self) -> None:
        """Fold the layer scale into the feed-forward network."""
        if self.layer_scale is not None:
            _fold_scale(self.mlp.fc2, self.layer_scale)
            self.layer_scale = None


class AttentionBlock(nn.Module):
    """A block of stages 4 and 5: self-attention, then the feed-forward network."""

    def __init__(
        self, width: int, ratio: int, head_dim: int, layer_scale: float, form: str
    ) -> None:
        super().__init__()
        fused = form == "fused"
        self.norm = ChannelNorm(width)
        self.token_mixer = SelfAttention(width, head_dim)
        self.layer_scale_1 = None if fused else LayerScale(width, layer_scale)
        self.mlp = ConvFFN(width, ratio, form)
        self.layer_scale_2 = None if fused else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.token_mixer(self.norm(x))
        x = x + (mixed if self.layer_scale_1 is None else self.layer_scale_1(mixed))
        out = self.mlp(x)
        return x + (out if self.layer_scale_2 is None else self.layer_scale_2(out))

    def fold(self) -> None:
        """Fold both layer scales into the projections before them."""
        if self.layer_scale_1 is not None and self.layer_scale_2 is not None:
            _fold_scale(self.token_mixer.proj, self.layer_scale_1)
            _fold_scale(self.mlp.fc2, self.layer_scale_2)
            self.layer_scale_1 = self.layer_scale_2 = None


class PositionEncoding(nn.Module):
    """Conditional position encoding: a 7x7 depthwise convolution added to its input."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.residual = form == "training"
        self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)

    def reparameterize(self) -> None:
        """Fold the residual into the convolution."""
        if self.residual:
            width = self.conv.out_channels
            copy = identity_kernel(width, width, 7, self.conv.weight)
            self.conv.weight.data = self.conv.weight.data + copy
            self.residual = False


class Downsample(nn.Module):
    """Halve the resolution: 7x7 depthwise with stride 2 beside a 3x3, then 1x1."""

    def __init__(self, inputs: int, outputs: int, form: str) -> None:
        super().__init__()
        self.large = RepConv(
            inputs, outputs, 7, stride=2, groups=inputs, branches=Branches(small=3), form=form
        )
        self.point = RepConv(outputs, outputs, 1, branches=Branches(identity=True), form=form)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.large(x))
