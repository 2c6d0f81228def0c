"""Images: mutated files given in every way, arrays and tensors, texts and odd objects."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image as transformers_load_image

from fastvlm.vision.loading import load_image
from fastvlm_example.scenes import render, sample
from tests.fuzzing.area import WrongError
from tests.fuzzing.mutations import Edit, edited, edits, odd_values

WAYS = ("path", "string", "uri", "bytes", "stream", "data", "pillow")
LIKE_TRANSFORMERS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Modes whose conversion to RGB is Pillow's own."""
DTYPES = ("bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float32",
          "float64", "complex64", "object", "str")  # fmt: skip
FILLS = ("bytes", "unit", "signed", "nan", "huge", "zero")


@dataclass(frozen=True, slots=True)
class File:
    """A file of an image, changed, and the way in which it is given."""

    base: str
    edits: tuple[Edit, ...]
    way: str


@dataclass(frozen=True, slots=True)
class Array:
    """An array or a tensor."""

    shape: tuple[int, ...]
    dtype: str
    fill: str
    tensor: bool


@dataclass(frozen=True, slots=True)
class Given:
    """Any other value."""

    value: Any


class Images:
    """See `Area`."""

    name: ClassVar[str] = "images"
    share: ClassVar[float] = 0.54

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bases = dict(_bases())

    def cases(self) -> st.SearchStrategy[Any]:
        """See `Area`."""
        files = st.builds(File, st.sampled_from(sorted(self.bases)), edits(), st.sampled_from(WAYS))
        side = st.integers(0, 9)
        shapes = st.one_of(
            st.tuples(side, side),
            st.tuples(side, side, st.integers(0, 5)),
            st.tuples(st.integers(0, 5), side, side),
            st.lists(side, max_size=5).map(tuple),
        )
        arrays = st.builds(
            Array, shapes, st.sampled_from(DTYPES), st.sampled_from(FILLS), st.booleans()
        )
        texts = st.one_of(st.text(max_size=40), st.sampled_from(TEXTS), st.binary(max_size=40))
        return st.one_of(files, files, files, arrays, st.builds(Given, texts | odd_values))

    def check(self, case: Any) -> None:
        """See `Area`."""
        given = self.given(case)
        found = load_image(given)
        if not isinstance(found, Image.Image) or found.mode != "RGB" or not all(found.size):
            raise WrongError(f"{found!r}")
        found.load()
        if isinstance(case, File):
            compare(found, edited(self.bases[case.base], case.edits))

    def given(self, case: Any) -> Any:
        """Return a case as a user gives it."""
        if isinstance(case, Given):
            return case.value
        if isinstance(case, Array):
            return made(case)
        content = edited(self.bases[case.base], case.edits)
        file = self.folder / "image"
        file.write_bytes(content)
        if case.way == "pillow":
            return Image.open(io.BytesIO(content)) if _opens(content) else content
        return {
            "path": file,
            "string": str(file),
            "uri": file.as_uri(),
            "bytes": content,
            "stream": io.BytesIO(content),
            "data": "data:image/png;base64," + base64.b64encode(content).decode(),
        }[case.way]


def compare(found: Image.Image, content: bytes) -> None:
    """Compare an image with what transformers' own loader makes of the file.

    Raises:
        WrongError: They differ.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(io.BytesIO(content))
            if opened.mode not in LIKE_TRANSFORMERS or opened.width * opened.height > 10**7:
                return
            expected = transformers_load_image(opened)
        except Exception:  # noqa: BLE001 (what it refuses, we may show)
            return
    if found.size != expected.size or found.tobytes() != expected.tobytes():
        raise WrongError(f"{found.size} pixels are not transformers' {expected.size}")


def made(case: Array) -> Any:
    """Return an array or a tensor, drawn from its own description."""
    random = np.random.default_rng(len(case.shape) + sum(case.shape))
    values = random.random(case.shape)
    values = {
        "bytes": np.floor(values * 256),
        "unit": values,
        "signed": values * 2 - 1,
        "nan": np.where(values < 0.5, np.nan, values),
        "huge": values * 1e30,
        "zero": values * 0,
    }[case.fill]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = values.astype(case.dtype)
    if case.tensor and case.dtype not in ("object", "str"):
        return torch.as_tensor(array)
    return array


def _opens(content: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(content))
    except Exception:  # noqa: BLE001 (then there is no Pillow image to give)
        return False
    return True


def _bases() -> dict[str, bytes]:
    scene = render(sample(1), 64).resize((24, 17))
    alpha = scene.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(scene.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "rgb.png": (scene, "PNG", {}),
        "rgba.png": (alpha, "PNG", {}),
        "palette.png": (scene.quantize(16), "PNG", {"transparency": 3}),
        "grey.png": (scene.convert("L"), "PNG", {}),
        "grey-alpha.png": (alpha.convert("LA"), "PNG", {}),
        "bit.png": (scene.convert("1"), "PNG", {}),
        "deep.png": (scene.convert("I;16"), "PNG", {}),
        "turned.jpg": (scene, "JPEG", {"exif": exif}),
        "grey.jpg": (scene.convert("L"), "JPEG", {}),
        "cmyk.jpg": (scene.convert("CMYK"), "JPEG", {}),
        "progressive.jpg": (scene, "JPEG", {"progressive": True}),
        "animated.gif": (scene, "GIF", {"save_all": True, "append_images": [alpha]}),
        "lossy.webp": (alpha, "WEBP", {}),
        "rgb.bmp": (scene, "BMP", {}),
        "lzw.tif": (alpha, "TIFF", {"compression": "tiff_lzw"}),
        "float.tif": (scene.convert("F"), "TIFF", {}),
        "rgb.ppm": (scene, "PPM", {}),
        "rgba.tga": (alpha, "TGA", {}),
        "icon.ico": (alpha, "ICO", {}),
    }
    found = {}
    for name, (image, kind, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        found[name] = file.getvalue()
    return found


TEXTS = [
    "https://example.com/a.png",
    "http:/x",
    "file:///",
    "file://host/share/a.png",
    "data:",
    "data:image/png;base64,",
    "data:image/png;base64,%%%",
    "data:text/plain,hello",
    "data:image/svg+xml,<svg/>",
    "iVBORw0KGgo=",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "/",
    "~",
    "a\0b",
    "x" * 5000,
    "ftp://a/b",
    "s3://bucket/key.png",
]
