"""Loading images: files, bytes, URLs, Pillow images, arrays and tensors."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ChannelDimension

from fastvlm.functional.errors import InputError, first_line, shortened

ImageInput = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | Image.Image
    | np.ndarray
    | Tensor
    | Sequence[Any]
)
"""Anything that can be loaded as an image, see `load_image`."""

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused before they are decoded (where Pillow begins to warn)."""
MAX_PIXELS_BEFORE_HALVING = 40_000_000
"""Images with more pixels are halved, which leaves them sharper than any encoder sees them."""
MAX_FILE_BYTES = 2**29
"""Streams with more bytes are refused: an image of `MAX_PIXELS` is smaller, even unpacked."""
CHANNEL_COUNTS = (1, 3, 4)
"""The numbers of channels that an array may have."""
HIGH_BIT_DEPTH_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Modes of Pillow with more than eight bits a channel."""
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transpose that turns an image of each EXIF orientation upright."""
BASE64_PATTERN = re.compile(r"[A-Za-z0-9+/\s]{16,}={0,2}\s*")
_filters = threading.Lock()
"""A lock for changes of Python's warning filters, which belong to the process."""


def load_image(image: ImageInput) -> Image.Image:
    """Return an image upright and in RGB, as `transformers`' own `load_image` does.

    Transparent parts get the colours stored under them, and values above 255 of deeper images are
    clipped with a warning. Unlike there, images of more than `MAX_PIXELS_BEFORE_HALVING` pixels are
    halved, JPEGs while they are decoded.

    Args:
        image: A path, a `file://` or `data:` URL, base64, bytes, a binary file, a Pillow image, or
            an array or tensor: (height, width), (height, width, channels) or (channels, height,
            width), with 1, 3 or 4 channels and values of 0 to 255, or floats of 0 to 1. A list of
            one of these, or an array with a leading 1, stands for its only image.

    Raises:
        InputError: There is no such file, or it is no image, truncated or far too large.
    """
    for kinds, load in IMAGE_LOADERS:
        if isinstance(image, kinds):
            return load(image)
    if hasattr(image, "read"):
        return _decode(io.BytesIO(_read(image)), f"The file {shortened(image)}")
    if hasattr(image, "__array__"):
        return _load_array(np.asarray(image))
    raise InputError(
        "An image is a path, bytes, a file, a Pillow image, an array or a tensor; got"
        f" {shortened(image)}."
    )


def _load_pillow(image: Image.Image) -> Image.Image:
    return _upright(image, "The Pillow image")


def _load_bytes(image: bytes | bytearray | memoryview) -> Image.Image:
    return _decode(io.BytesIO(image), f"What is given as an image ({len(image):,} bytes)")


def _load_only(images: Sequence[Any]) -> Image.Image:
    if len(images) != 1:
        raise InputError(f"One image is expected here; got a list of {len(images)}.")
    return load_image(images[0])


def _load_text(text: str) -> Image.Image:
    scheme, separator, _ = text.partition(":")
    scheme = scheme.lower()
    if scheme == "data" and separator:
        return _decode(io.BytesIO(_data_of(text)), f"The data URL {shortened(text)}")
    if scheme == "file" and text[len("file:") :].startswith("//"):
        return _load_path(_path_of(text))
    if re.match(r"[a-z][a-z0-9+.-]+:/", scheme + text[len(scheme) :]) and not os.path.isfile(text):  # noqa: PTH113
        raise InputError(
            f"fastvlm opens no URLs; download {shortened(text)} first and give the file, or its"
            " bytes."
        )
    # As transformers has it, what is no file may be an image's base64.
    if not os.path.isfile(text) and BASE64_PATTERN.fullmatch(text):  # noqa: PTH113 (pathlib's raises)
        try:
            return _decode(io.BytesIO(base64.decodebytes(text.encode())), "The base64 text")
        except (InputError, binascii.Error):
            pass
    return _load_path(text)


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise InputError(
            f"A file's URL names no host, as in file:///home/me/a.png; got {shortened(url)}."
        )
    return url2pathname(parts.path)


def _data_of(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise InputError(f"A data URL has a comma before its data; got {shortened(url)}.")
    data = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.decodebytes(data)
    except binascii.Error as error:
        raise InputError(f"{shortened(url)} is no base64: {first_line(error)}.") from error


def _load_path(given: str | os.PathLike[str]) -> Image.Image:
    path = os.fsdecode(given)
    # A pipe or a device might never end.
    if not os.path.isfile(path):  # noqa: PTH113 (pathlib's raises where a name is too long)
        raise InputError(f"There is no image at {shortened(path, 200)}.")
    return _decode(Path(path), path)


def _read(file: Any) -> bytes:
    """Return all bytes of a binary file, which is left where it stood."""
    try:
        place = file.tell() if file.seekable() else None
        if place:
            file.seek(0)
        content = file.read(MAX_FILE_BYTES + 1)
        if place is not None:
            file.seek(place)
    except Exception as error:  # a file object may be anything with a `read`
        raise InputError(
            f"The file {shortened(file)} can't be read: {first_line(error)}."
        ) from error
    if not isinstance(content, bytes):
        raise InputError(f"The file {shortened(file)} is not opened in binary mode.")
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"The file {shortened(file)} has more than {MAX_FILE_BYTES:,} bytes.")
    return content


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with _filters, warnings.catch_warnings():
            # Of images that are large, which are refused below, and of odd metadata.
            warnings.simplefilter("ignore")
            opened = Image.open(source)
        with opened as image:
            _check_pixels(image.width * image.height, name)
            if image.width * image.height > MAX_PIXELS_BEFORE_HALVING:
                # Only JPEG's decoder can; it takes a quarter of the memory then.
                image.draft(None, (image.width // 2, image.height // 2))
            return _upright(image, name)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image in a format that Pillow reads.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has more pixels than {MAX_PIXELS:,}, the limit.") from error
    except MemoryError as error:
        raise InputError(f"{name} is too large for the memory.") from error
    except Exception as error:  # Pillow's readers raise errors of any kind on broken files
        raise InputError(f"{name} can't be decoded as an image: {first_line(error)}.") from error


def _check_pixels(pixels: int, name: str) -> None:
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    if pixels > limit:
        raise InputError(f"{name} has {pixels:,} pixels; the limit is {limit:,}.")
    if not pixels:
        raise InputError(f"{name} has no pixels.")


def _upright(image: Image.Image, name: str) -> Image.Image:
    _check_pixels(image.width * image.height, name)
    try:
        image.load()
        turn = EXIF_TRANSPOSES.get(_orientation(image))
        if image.width * image.height > MAX_PIXELS_BEFORE_HALVING:
            image = _halved(image)
        if image.mode in HIGH_BIT_DEPTH_MODES:
            _warn_of_clipping(image, name)
        return _rgb(image if turn is None else image.transpose(turn))
    except Exception as error:  # a Pillow image may be closed, cut, or of a reader with any errors
        raise InputError(f"{name} can't be decoded as an image: {first_line(error)}.") from error


def _orientation(image: Image.Image) -> Any:
    # Only this one entry is read: the others may be broken, and Pillow's own transposition would
    # write them all again.
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # To the same colours, without Pillow's advice to convert it in this way.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _warn_of_clipping(image: Image.Image, name: str) -> None:
    _, highest = image.getextrema()
    if isinstance(highest, int | float) and highest > 255:
        warnings.warn(
            f"{name} has values up to {highest:g}, of which all above 255 are shown as white, as"
            " transformers shows them; scale it to 8 bits first.",
            stacklevel=4,
        )


def _halved(image: Image.Image) -> Image.Image:
    if image.mode in ("1", "P", "PA"):
        image = _rgb(image)
    elif image.mode.startswith("I;16"):
        return image
    return image.reduce(2)


def _load_tensor(tensor: Tensor) -> Image.Image:
    try:
        plain = tensor.detach().cpu()
        if plain.is_floating_point():
            plain = plain.float()
        array = plain.numpy()
    except (
        Exception
    ) as error:  # sparse, quantised, meta and nested tensors have errors of their own
        raise InputError(
            f"The tensor of {tensor.dtype} holds no image: {first_line(error)}."
        ) from error
    return _load_array(array)


def _load_array(array: np.ndarray) -> Image.Image:
    shape = " x ".join(map(str, array.shape)) or "no dimensions"
    name = f"The array of {array.dtype} with {shape}"
    if array.dtype.kind not in "uif":
        raise InputError(f"{name} is no image: its values are numbers of 0 to 255, or of 0 to 1.")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size:
        raise InputError(
            f"{name} is no image: (height, width), (height, width, channels) or (channels, height,"
            " width) is expected, of one image."
        )
    # As transformers looks for them: three or one before four, and first where both could be.
    for numbers in (CHANNEL_COUNTS[:2], CHANNEL_COUNTS[2:]):
        for axis, place in ((0, ChannelDimension.FIRST), (2, ChannelDimension.LAST)):
            if array.shape[axis] in numbers:
                return _upright(_pillow_image(array, place, name), name)
    raise InputError(f"{name} is no image: it has none of {CHANNEL_COUNTS} channels first or last.")


def _pillow_image(array: np.ndarray, place: ChannelDimension, name: str) -> Image.Image:
    _check_pixels(array.size // (array.shape[0 if place is ChannelDimension.FIRST else 2]), name)
    lowest, highest = array.min(), array.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise InputError(f"{name} is no image: not all of its values are finite.")
    if lowest < 0 or highest > 255:
        raise InputError(f"{name} has values of {lowest:g} to {highest:g}; 0 to 255 is expected.")
    try:
        return to_pil_image(array, input_data_format=place)
    except ValueError as error:
        raise InputError(
            f"{name} has values of {lowest:g} to {highest:g}: floats lie between 0 and 1, or are"
            " whole numbers."
        ) from error


IMAGE_LOADERS: tuple[tuple[type | tuple[type, ...], Callable[[Any], Image.Image]], ...] = (
    (Image.Image, _load_pillow),
    (str, _load_text),
    (os.PathLike, _load_path),
    ((bytes, bytearray, memoryview), _load_bytes),
    (Tensor, _load_tensor),
    (np.ndarray, _load_array),
    ((list, tuple), _load_only),
)
"""Loaders of images, by the types of their inputs."""
