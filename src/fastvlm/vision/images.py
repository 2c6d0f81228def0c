"""Preparing images for the encoder: square, of a given size, as tensors in [0, 1]."""

from __future__ import annotations

from typing import TypedDict

import torch
from PIL import Image
from torch import Tensor

from fastvlm.functional.errors import InputError, shortened
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.loading import ImageInput, load_image

FIT_MODES = ("pad", "crop", "stretch")
MAX_SIDE_PIXELS = 8192
"""The maximum side in pixels; longer images are reduced to this before they are padded."""
MAX_TILES = 4


class ImageOptions(TypedDict, total=False):
    """How an image is shown to the model.

    Args:
        image_size: Side in pixels, a multiple of 64: every 64 x 64 pixels are one visual token. The
            model's own, if not given.
        fit: How the image is made square: `pad` (Apple's reference; the default), `crop` or
            `stretch`.
        tiles: Rows and columns of tiles that are shown besides the whole image, each as large; 1,
            the default, for the whole image alone.
    """

    image_size: int
    fit: str
    tiles: int


def pad_to_square(image: Image.Image) -> Image.Image:
    """Return an image in the middle of a black square, as Apple's reference pads it.

    An image with a side of more than `MAX_SIDE_PIXELS` pixels is first reduced to that, as the
    square around a very long image may not fit into memory.
    """
    if max(image.size) > MAX_SIDE_PIXELS:
        scale = MAX_SIDE_PIXELS / max(image.size)
        reduced = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(reduced, Image.Resampling.BOX)
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def crop_to_square(image: Image.Image) -> Image.Image:
    """Return the square in the middle of an image, as `transformers`' processor crops it."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def prepare(image: ImageInput, image_size: int, fit: str = "pad", tiles: int = 1) -> Tensor:
    """Return an image as the encoder takes it: (parts, 3, image_size, image_size) in [0, 1].

    Args:
        image: See `load_image`.
        image_size: Side of a part in pixels, a multiple of 64.
        fit: How the image is made square, one of `FIT_MODES`: `pad` adds black bars (Apple's
            reference), `crop` keeps its middle (`transformers`' processor), `stretch` distorts it.
        tiles: With more than 1, the whole image is followed by this many rows and columns of tiles,
            each as large as a part (the paper's 2048 px are two times two tiles of 1024).

    Raises:
        InputError: The image can't be opened, or an option is out of range.
    """
    size = image_size
    if not isinstance(size, int) or size < REDUCTION or size % REDUCTION:
        raise InputError(f"image_size must be a multiple of {REDUCTION}; got {shortened(size)}.")
    if not isinstance(fit, str) or fit not in FIT_MODES:
        raise InputError(
            f"An image is made to fit by {', '.join(FIT_MODES)}; got {shortened(repr(fit))}."
        )
    if not isinstance(tiles, int) or not 1 <= tiles <= MAX_TILES:
        raise InputError(f"tiles lies between 1 and {MAX_TILES}; got {shortened(tiles)}.")
    if size * tiles > MAX_SIDE_PIXELS:
        raise InputError(
            f"image_size times tiles is at most {MAX_SIDE_PIXELS:,} pixels;"
            f" got {size:,} times {tiles}."
        )
    opened = load_image(image)
    square = {"pad": pad_to_square, "crop": crop_to_square}.get(fit, _unchanged)(opened)
    parts = [square.resize((size, size), Image.Resampling.BICUBIC)]
    if tiles > 1:
        large = square.resize((tiles * size, tiles * size), Image.Resampling.BICUBIC)
        parts += [
            large.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
            for row in range(tiles)
            for column in range(tiles)
        ]
    return torch.stack([to_tensor(part) for part in parts])


def count_parts(tiles: int) -> int:
    """Return the number of parts that `prepare` makes: the whole image, and its tiles."""
    return 1 if tiles == 1 else 1 + tiles * tiles


def _unchanged(image: Image.Image) -> Image.Image:
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as (3, height, width) in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = flat.view(image.height, image.width, 3).permute(2, 0, 1)
    return pixels.float() / 255
