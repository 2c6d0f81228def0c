"""Pictures as the encoder takes them: Pillow in, a tensor in [0, 1] out."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def to_tensor(picture: Image.Image) -> Tensor:
    """Return an RGB picture as (3, height, width) in [0, 1]."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = flat.view(picture.height, picture.width, 3).permute(2, 0, 1)
    return pixels.float() / 255
