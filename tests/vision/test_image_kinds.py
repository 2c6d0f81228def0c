"""Every kind of image is `transformers`' own result or one sentence."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image as transformers_load_image

from fastvlm.functional.errors import InputError
from fastvlm.vision.loading import MAX_PIXELS_BEFORE_HALVING, load_image
from fastvlm_example.scenes import render, sample

pytestmark = pytest.mark.filterwarnings("ignore")

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F")
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "DDS",
           "PCX", "SGI", "DIB")  # fmt: skip
SIZE = (13, 10)


def scene(mode: str = "RGB") -> Image.Image:
    """Return a small scene with hidden colours under what is transparent."""
    image = render(sample(4), 64).resize(SIZE)
    if mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(SIZE))
        return image if mode == "RGBA" else image.convert(mode)
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    if mode == "I":
        return image.convert("L").convert("I").point(lambda value: value * 300)
    if mode == "F":
        return image.convert("L").convert("F").point(lambda value: value * 1.5)
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as a file's content."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def files() -> dict[str, bytes]:
    """Return a file of each mode in each format that has it, and the special ones."""
    found = {}
    for kind in FORMATS:
        for mode in MODES:
            try:
                found[f"{mode} as {kind}"] = encoded(scene(mode), kind)
            except (OSError, ValueError, KeyError, TypeError):
                continue
    turns = {}
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            turns[f"orientation {orientation} as {kind}"] = encoded(scene(), kind, exif=exif)
    palette = scene("P")
    return {
        **found,
        **turns,
        "clear colour": encoded(scene(), "PNG", transparency=(200, 30, 40)),
        "clear grey": encoded(scene("L"), "PNG", transparency=7),
        "clear entry": encoded(palette, "PNG", transparency=3),
        "clear entries": encoded(palette, "PNG", transparency=bytes(range(250, 0, -1))),
        "animated": encoded(scene(), "GIF", save_all=True, append_images=[scene("L")]),
        "progressive": encoded(scene(), "JPEG", progressive=True, quality=40),
        "broken profile": encoded(scene(), "PNG", icc_profile=b"none"),
        "junk after": encoded(scene(), "JPEG") + b"junk" * 100,
    }


FILES = files()
WAYS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "file URL": lambda path: path.as_uri(),
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memory": lambda path: memoryview(path.read_bytes()),
    "stream": lambda path: io.BytesIO(path.read_bytes()),
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "data URL": lambda path: (
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    ),
    "Pillow": Image.open,
    "list": lambda path: [path],
    "nested list": lambda path: [[str(path)]],
}
DTYPES = ("bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float32",
          "float64", "complex64")  # fmt: skip
SHAPES = ((10, 13), (10, 13, 1), (10, 13, 3), (10, 13, 4), (1, 10, 13), (3, 10, 13), (4, 10, 13),
          (1, 10, 13, 3), (3, 10, 3), (10, 13, 2), (10, 13, 5), (2, 10, 13, 3), (0, 13, 3),
          (13,), ())  # fmt: skip
SCALES = {"bytes": 255.0, "unit": 1.0, "beyond": 1000.0}


def same(found: Image.Image, expected: Image.Image) -> bool:
    """Return whether two images are equal."""
    return (found.mode, found.size, found.tobytes()) == (
        "RGB",
        expected.size,
        expected.tobytes(),
    )


def test_there_are_hundreds() -> None:
    assert len(FILES) + len(WAYS) + len(DTYPES) * len(SHAPES) * len(SCALES) > 200
    assert len(FILES) > 100


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_shown_as_transformers_shows_it(name: str, tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(FILES[name])
    assert same(load_image(file), transformers_load_image(str(file)))


@pytest.mark.parametrize("mode", MODES)
def test_a_pillow_image_is_shown_as_transformers_shows_it(mode: str) -> None:
    image = scene(mode)
    before = (image.mode, image.tobytes(), dict(image.info))
    assert same(load_image(image), transformers_load_image(image))
    assert (image.mode, image.tobytes(), dict(image.info)) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_given_in_any_way(way: str, tmp_path: Path) -> None:
    file = tmp_path / "an image é.png"
    file.write_bytes(FILES["RGBA as PNG"])
    given = WAYS[way](file)
    expected = transformers_load_image(str(file))
    for _ in range(2):  # a stream is left where it stood
        assert same(load_image(given), expected)


def test_an_opened_file_is_left_where_it_stood(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(FILES["RGB as PNG"])
    with file.open("rb") as opened:
        opened.seek(20)
        assert same(load_image(opened), transformers_load_image(str(file)))
        assert opened.tell() == 20


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_is_shown_as_transformers_shows_it(
    dtype: str, shape: tuple[int, ...], scale: str
) -> None:
    values = np.random.default_rng(3).random(shape) * SCALES[scale]
    array = np.asarray(values).astype(dtype)
    try:
        found = load_image(array)
    except InputError:
        found = None
    if dtype not in ("bool", "complex64"):
        tensor = torch.from_numpy(array.copy())
        if found is None:
            with pytest.raises(InputError):
                load_image(tensor)
        else:
            assert same(load_image(tensor.requires_grad_(tensor.is_floating_point())), found)
    expected = shown_by_transformers(array)
    if found is None:
        # Only what is no image to transformers either, has no pixels, or has no numbers in it.
        assert expected is None or not array.size or dtype in ("bool", "complex64")
    else:
        assert expected is not None
        assert same(found, expected)


def shown_by_transformers(array: np.ndarray) -> Image.Image | None:
    """Return what transformers makes of an array; None where it refuses it."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    for place in (None, "channels_first", "channels_last"):
        four = array.ndim == 3 and 4 in array.shape
        if place is None if four else place is not None:
            continue
        if place and array.shape[0 if place == "channels_first" else 2] != 4:
            continue
        try:
            return to_pil_image(array, input_data_format=place).convert("RGB")
        except (ValueError, TypeError, IndexError):
            return None
    return None


def test_tensors_of_half_precision_and_odd_strides() -> None:
    pixels = torch.rand(3, 10, 13)
    assert same(load_image(pixels.bfloat16()), load_image(pixels.bfloat16().float()))
    assert same(load_image(pixels.permute(1, 2, 0)), load_image(pixels))
    assert same(load_image(np.asfortranarray(pixels.numpy())[:, ::-1]), load_image(pixels.flip(1)))


def named(given: Any) -> str:
    """Return a case's name, the same in every process."""
    return ascii(re.sub(r" at 0x\w+", "", repr(given)))[:40]


@pytest.mark.parametrize(
    "given",
    [
        "https://example.com/a.png", "http://example.com", "s3://bucket/a.png", "HTTPS://X/a.png",
        "file://other-host/a.png", "file:///none.png", "data:", "data:image/png;base64,",
        "data:image/png;base64,!!!", "data:text/plain,hello", "data:image/svg+xml,<svg/>",
        "", " ", "none.png", "\0", "a\0b", "x" * 5000, "iVBORw0KGgoAAAANSUhEUg==", "caf\udce9.png",
        "/", "/dev/zero", "/dev/null", b"", b"words", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"%PDF-1.4",
        None, 7, 1.5, True, object(), {}, {"url": "a.png"}, [], [None], ["a", "b"], (), set(),
        io.StringIO("text"), io.BytesIO(), torch.zeros(3, 8, 8, device="meta"),
        torch.zeros(3, 8, 8).to_sparse(), torch.full((3, 8, 8), torch.nan),
        np.full((8, 8), np.inf), np.full((8, 8), -1.0), np.array("text"), np.array([None]),
        Image.new("RGB", (0, 4)), Image.new("L", (4, 0)),
    ],
    ids=named,
)  # fmt: skip
def test_the_rest_is_refused(given: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_image(given)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_closed_and_cut_pillow_images_and_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(encoded(render(sample(1), 128), "PNG"))
    closed = Image.open(file)
    closed.close()
    stream = file.open("rb")
    stream.close()
    cut = Image.open(io.BytesIO(file.read_bytes()[:300]))
    for given in (closed, stream, cut):
        with pytest.raises(InputError):
            load_image(given)


def test_deep_images_are_clipped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="8 bits"):
        load_image(scene("I"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(Image.new("I", (2, 2), 200))


PEAK = """
import resource, sys
from fastvlm.vision.loading import load_image
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
image = load_image(sys.argv[1])
print(*image.size, peak() - before)
"""


def test_a_large_photo_is_halved_while_it_is_decoded(tmp_path: Path) -> None:
    file = tmp_path / "large.jpg"
    size = (9000, 6000)
    assert size[0] * size[1] > MAX_PIXELS_BEFORE_HALVING
    Image.new("RGB", size, (200, 30, 40)).save(file)
    command = [sys.executable, "-c", PEAK, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    width, height, held = map(int, done.stdout.split())
    assert (width, height) == (4500, 3000)
    # A quarter of the pixels, once in the decoder's mode and once in RGB.
    assert held < 0.6 * 3 * size[0] * size[1]
