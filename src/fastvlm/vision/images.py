"""Pictures as the encoder takes them: a file or a Pillow image in, a tensor in [0, 1] out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TypedDict

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from fastvlm.functional.errors import InputError
from fastvlm.vision.configuration import REDUCTION

ImageInput = str | Path | Image.Image
"""What a caller may give as a picture."""

MOST_PIXELS = 178_956_970
"""Pictures with more pixels are refused before they are decoded (Pillow's own limit)."""


LARGE = 40_000_000
"""Pixels: pictures with more are halved first, which leaves them sharper than any view of them."""
FITS = ("pad", "crop", "stretch")
LONGEST_SIDE = 8192
"""Pixels: longer pictures are reduced to this before they are padded."""
MOST_TILES = 4
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


class ImageOptions(TypedDict, total=False):
    """How a picture is shown to the model.

    Args:
        image_size: Side in pixels, a multiple of 64: every 64 x 64 pixels are one visual token. The
            model's own, if not given.
        fit: What makes the picture square: `pad` (Apple's reference; if not given), `crop` or
            `stretch`.
        tiles: Rows and columns of tiles that are shown besides the whole picture, each as large; 1,
            if not given, for the whole alone.
    """

    image_size: int
    fit: str
    tiles: int


def load_image(picture: ImageInput) -> Image.Image:
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
    if image.width * image.height > LARGE:
        image = _halved(image)
    upright = image if turn is None else image.transpose(turn)
    # More than eight bits a pixel: a conversion would clip at 255 and leave it white.
    if upright.mode.startswith("I;16"):
        high = slice(0, None, 2) if upright.mode.endswith("B") else slice(1, None, 2)
        upright = Image.frombytes("L", upright.size, upright.tobytes()[high])
    elif upright.mode == "I":
        upright = upright.point(lambda value: value * (1 / 256)).convert("L")
    if upright.has_transparency_data:
        # Pasted and not composited, which would hold four copies of a large picture at a time.
        seen = upright if upright.mode == "RGBA" else upright.convert("RGBA")
        black = Image.new("RGB", seen.size)
        black.paste(seen, mask=seen.getchannel("A"))
        return black
    return upright.convert("RGB")


def _halved(image: Image.Image) -> Image.Image:
    # What follows makes copies, and of so large a picture each would take a third of a gigabyte.
    if image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode.startswith("I;16"):
        return image
    return image.reduce(2)


def pad_to_square(picture: Image.Image) -> Image.Image:
    """Return a picture in the middle of a black square, as Apple's reference pads it.

    A side of more than `LONGEST_SIDE` pixels is reduced to that first: the square around a very
    long picture may be larger than the memory.
    """
    if max(picture.size) > LONGEST_SIDE:
        scale = LONGEST_SIDE / max(picture.size)
        reduced = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(reduced, Image.Resampling.BOX)
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def crop_to_square(picture: Image.Image) -> Image.Image:
    """Return the square in the middle of a picture, as `transformers`' processor crops it."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def prepare(picture: ImageInput, image_size: int, fit: str = "pad", tiles: int = 1) -> Tensor:
    """Return a picture as the encoder takes it: (views, 3, image_size, image_size) in [0, 1].

    Args:
        picture: A path or a Pillow image.
        image_size: Side of a view in pixels, a multiple of 64.
        fit: What makes it square, one of `FITS`: `pad` shows all of it between black bars (Apple's
            reference), `crop` its middle (`transformers`' processor), `stretch` squashes it.
        tiles: With more than 1, the whole is followed by so many rows and columns of tiles, each as
            large as a view (the paper's 2048 px are two times two tiles of 1024).

    Raises:
        InputError: The picture can't be opened, or an option is out of range.
    """
    size = image_size
    if size < REDUCTION or size % REDUCTION:
        raise InputError(f"image_size must be a multiple of {REDUCTION}; got {size}.")
    if fit not in FITS:
        raise InputError(f"A picture is made to fit by {', '.join(FITS)}; got {fit!r}.")
    if not 1 <= tiles <= MOST_TILES:
        raise InputError(f"tiles lies between 1 and {MOST_TILES}; got {tiles}.")
    opened = load_image(picture)
    square = {"pad": pad_to_square, "crop": crop_to_square}.get(fit, _unchanged)(opened)
    views = [square.resize((size, size), Image.Resampling.BICUBIC)]
    if tiles > 1:
        large = square.resize((tiles * size, tiles * size), Image.Resampling.BICUBIC)
        views += [
            large.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
            for row in range(tiles)
            for column in range(tiles)
        ]
    return torch.stack([to_tensor(view) for view in views])


def count_views(tiles: int) -> int:
    """Return how many views `prepare` makes."""
    return 1 if tiles == 1 else 1 + tiles * tiles


def _unchanged(picture: Image.Image) -> Image.Image:
    return picture


def to_tensor(picture: Image.Image) -> Tensor:
    """Return an RGB picture as (3, height, width) in [0, 1]."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = flat.view(picture.height, picture.width, 3).permute(2, 0, 1)
    return pixels.float() / 255
