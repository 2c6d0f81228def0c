"""Random crops of photos, so that a few thousand of them teach more than themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crops(images: Tensor, size: int, *, smallest: float = 0.5) -> Tensor:
    """Crop, mirror and recolour images at random.

    Args:
        images: (batch, 3, height, width), uint8.
        size: Side of the crops in pixels.
        smallest: The smallest share of an image's side that a crop shows.

    Returns:
        (batch, 3, size, size) in [0, 1].
    """
    batch = len(images)
    side = torch.empty(batch, 2).uniform_(smallest, 1.0)
    # Sides of one crop differ by a quarter at most: the photos are squashed already.
    side[:, 1] = torch.minimum(torch.maximum(side[:, 1], side[:, 0] / 1.25), side[:, 0] * 1.25)
    side = side.clamp(max=1.0)
    centre = (torch.rand(batch, 2) * 2 - 1) * (1 - side)
    mirror = torch.randint(2, (batch,)) * 2.0 - 1
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side[:, 0] * mirror, side[:, 1]
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
    crops = F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)
    gain = torch.empty(batch, 3, 1, 1).uniform_(0.9, 1.1) * torch.empty(batch, 1, 1, 1).uniform_(
        0.7, 1.3
    )
    mean = crops.mean((1, 2, 3), keepdim=True)
    contrast = torch.empty(batch, 1, 1, 1).uniform_(0.7, 1.3)
    return (((crops - mean) * contrast + mean) * gain).clamp(0, 1)


def mixed(crops: Tensor, targets: Tensor, *, alpha: float = 0.4) -> tuple[Tensor, Tensor]:
    """Mix each crop, and its targets, with the one before it (mixup, arXiv 1710.09412).

    Args:
        crops: (batch, 3, height, width).
        targets: (batch, words).
        alpha: Both parameters of the Beta distribution that the shares are drawn from.

    Returns:
        The same two shapes.
    """
    beta = torch.tensor(alpha)
    share = torch.distributions.Beta(beta, beta).sample((len(crops),))
    kept = torch.maximum(share, 1 - share)
    wide, narrow = kept[:, None, None, None], kept[:, None]
    return (
        wide * crops + (1 - wide) * crops.roll(1, 0),
        narrow * targets + (1 - narrow) * targets.roll(1, 0),
    )
