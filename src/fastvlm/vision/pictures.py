"""Pictures as the encoder takes them: a file or a Pillow image in, a tensor in [0, 1] out."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from fastvlm.functional.errors import InputError

Picture = str | Path | Image.Image
"""What a caller may give as a picture."""

MOST_PIXELS = 178_956_970
"""Pictures with more pixels are refused before they are decoded (Pillow's own limit)."""


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What rights a picture of each EXIF orientation."""


def open_picture(picture: Picture) -> Image.Image:
    """Return a picture upright and in RGB; transparent parts become black.

    Raises:
        InputError: There is no such file, or it is no picture, truncated or far too large.
    """
    if isinstance(picture, Image.Image):
        return _upright(picture)
    path = Path(picture)
    if not path.is_file():
        raise InputError(f"There is no picture at {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _upright(image)
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture in a format that Pillow reads.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{path} has more pixels than the limit of {MOST_PIXELS // 2:,} allows."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} can't be decoded as a picture: {error}.") from error


def _upright(image: Image.Image) -> Image.Image:
    # Only this one entry is read: the others may be broken, and Pillow's own transposition would
    # write them all again.
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode.startswith("I"):
        # Sixteen bits a pixel; a conversion would clip at 255 and leave it white.
        upright = upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        black = Image.new("RGBA", seen.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, seen).convert("RGB")
    return upright.convert("RGB")


def pad_to_square(picture: Image.Image) -> Image.Image:
    """Return a picture in the middle of a black square, as Apple's reference pads it."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def prepare(picture: Picture, size: int) -> Tensor:
    """Return a picture padded to a square and resized: (3, size, size) in [0, 1].

    Raises:
        InputError: The picture can't be opened.
    """
    square = pad_to_square(open_picture(picture))
    return to_tensor(square.resize((size, size), Image.Resampling.BICUBIC))


def to_tensor(picture: Image.Image) -> Tensor:
    """Return an RGB picture as (3, height, width) in [0, 1]."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = flat.view(picture.height, picture.width, 3).permute(2, 0, 1)
    return pixels.float() / 255
