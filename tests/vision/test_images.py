"""Images: upright, in RGB, padded; and what is said of files that can't be one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvlm.functional.errors import InputError
from fastvlm.vision.images import MAX_SIDE_PIXELS, crop_to_square, pad_to_square, prepare, to_tensor
from fastvlm.vision.loading import load_image

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))
ORIENTATION, DESCRIPTION = 0x0112, 0x010E


def quarters(width: int = 32, height: int = 32) -> Image.Image:
    """Red and green over blue and white."""
    image = Image.new("RGB", (2, 2))
    for corner, colour in zip(CORNERS, (RED, GREEN, BLUE, (255, 255, 255)), strict=True):
        image.putpixel(corner, colour)
    return image.resize((width, height), Image.Resampling.NEAREST)


def seen(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours of the four quarters' middles, each channel rounded to 0 or 255."""
    return [
        tuple(
            255 * (channel > 127)
            for channel in image.getpixel(
                (image.width * (1 + 2 * x) // 4, image.height * (1 + 2 * y) // 4)
            )
        )
        for x, y in CORNERS
    ]


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((8, 4), (0, 2, 8, 6)),
        ((4, 8), (2, 0, 6, 8)),
        ((7, 4), (0, 1, 7, 5)),
        ((6, 6), (0, 0, 6, 6)),
        ((9, 1), (0, 4, 9, 5)),
    ],
)
def test_padding_is_black_and_even(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    square = pad_to_square(Image.new("RGB", size, (9, 200, 30)))
    expected = Image.new("RGB", (max(size), max(size)), BLACK)
    expected.paste((9, 200, 30), box)
    assert square.size == expected.size
    assert square.tobytes() == expected.tobytes()


def test_a_tensor_holds_the_pixels() -> None:
    pixels = to_tensor(quarters(3, 2).resize((2, 2), Image.Resampling.NEAREST))
    assert pixels.dtype == torch.float32
    assert pixels.permute(1, 2, 0).tolist() == [[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 1]]]
    assert to_tensor(Image.new("RGB", (5, 3))).shape == (3, 3, 5)


def test_a_prepared_image_keeps_its_shape(tmp_path: Path) -> None:
    quarters(96, 48).save(tmp_path / "wide.png")
    for image in (tmp_path / "wide.png", str(tmp_path / "wide.png"), quarters(96, 48)):
        [pixels] = prepare(image, 64)
        assert pixels.shape == (3, 64, 64)
        assert 0 <= pixels.min() <= pixels.max() <= 1
        assert not pixels[:, :13].any()  # bicubic reaches two pixels over the edge
        assert not pixels[:, -13:].any()
        for (x, y), colour in zip(CORNERS, seen(quarters()), strict=True):
            middle = pixels[:, 24 + 16 * y, 16 + 32 * x] * 255
            assert middle.tolist() == pytest.approx(colour, abs=1e-3)


@pytest.mark.parametrize("size", [(8, 4), (4, 8), (7, 4), (6, 6)])
def test_cropping_keeps_the_middle(size: tuple[int, int]) -> None:
    wide = Image.new("RGB", size)
    for x in range(size[0]):
        for y in range(size[1]):
            wide.putpixel((x, y), (x, y, 0))
    side = min(size)
    square = crop_to_square(wide)
    assert square.size == (side, side)
    assert square.getpixel((0, 0)) == ((size[0] - side) // 2, (size[1] - side) // 2, 0)


def test_a_wide_image_fits_in_three_ways() -> None:
    wide = Image.new("RGB", (256, 128), BLUE)
    wide.paste(RED, (64, 0, 192, 128))
    padded, cropped, stretched = (prepare(wide, 128, fit)[0] for fit in ("pad", "crop", "stretch"))
    red, blue, black = (torch.tensor(colour) / 255 for colour in (RED, BLUE, BLACK))
    for found, corner, side in (
        (padded, black, blue),
        (cropped, red, red),
        (stretched, blue, blue),
    ):
        assert found[:, 4, 4].allclose(corner)
        assert found[:, 64, 4].allclose(side)
        assert found[:, 64, 64].allclose(red)


def test_tiles_show_the_whole_and_its_parts() -> None:
    image = quarters(256, 256)
    views = prepare(image, 128, tiles=2)
    assert views.shape == (5, 3, 128, 128)
    assert views[0].equal(prepare(image, 128)[0])
    for view, colour in zip(views[1:], seen(quarters()), strict=True):
        assert (view[:, 64, 64] * 255).tolist() == list(colour)
    assert prepare(image, 64, tiles=3).shape == (10, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"image_size": 100}, "image_size must be a multiple of 64; got 100"),
        ({"image_size": 0}, "multiple of 64; got 0"),
        ({"image_size": 64, "fit": "squeeze"}, "pad, crop, stretch; got 'squeeze'"),
        ({"image_size": 64, "tiles": 0}, "tiles lies between 1 and 4; got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        prepare(quarters(), **options)


def test_a_very_long_image_is_reduced_before_it_is_padded() -> None:
    line = Image.new("RGB", (3 * MAX_SIDE_PIXELS, 9), RED)
    square = pad_to_square(line)
    assert square.size == (MAX_SIDE_PIXELS, MAX_SIDE_PIXELS)
    assert square.getpixel((MAX_SIDE_PIXELS // 2, MAX_SIDE_PIXELS // 2)) == RED
    assert square.getpixel((MAX_SIDE_PIXELS // 2, MAX_SIDE_PIXELS // 2 - 4)) == BLACK


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_cameras_orientation_is_honoured(orientation: int, suffix: str, tmp_path: Path) -> None:
    # How a camera stores an upright image so that each orientation's turn rights it again.
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = quarters(64, 32) if turned is None else quarters(64, 32).transpose(turned)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / f"turned.{suffix}", exif=exif)
    image = load_image(tmp_path / f"turned.{suffix}")
    assert (image.mode, image.size) == ("RGB", (64, 32))
    assert seen(image) == seen(quarters())


@pytest.mark.parametrize("tag", [b"\x01\x56", b"\x01\x54", b"\x01\x1a"])
def test_a_photo_with_broken_metadata_is_still_a_image(tag: bytes, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION], exif[DESCRIPTION] = 6, "hello"
    file = tmp_path / "broken.jpg"
    quarters(64, 32).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    # Text where a number belongs.
    whole = file.read_bytes()
    assert whole.count(b"\x01\x0e\x00\x02") == 1
    file.write_bytes(whole.replace(b"\x01\x0e\x00\x02", tag + b"\x00\x02"))
    assert seen(load_image(file)) == seen(quarters())


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("P", "png"),
        ("P", "gif"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("YCbCr", "jpg"),
        ("RGBA", "png"),
    ],
)
def test_colours_survive_any_mode(mode: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"image.{suffix}"
    quarters().convert(mode).save(file)
    image = load_image(file)
    assert image.mode == "RGB"
    assert seen(image) == seen(quarters())


def spoilt(name: str, folder: Path) -> Path:
    """Write a file that is no whole image."""
    file = folder / name
    whole = folder / "whole.jpg"
    quarters(64, 64).save(whole)
    if name == "folder.jpg":
        file.mkdir()
    elif name != "missing.jpg":
        contents = {
            "text.jpg": b"These are words.",
            "empty.jpg": b"",
            "cut.jpg": whole.read_bytes()[:-200],
            "head.jpg": whole.read_bytes()[:30],
        }
        file.write_bytes(contents[name])
    return file


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.jpg", "There is no image at"),
        ("folder.jpg", "There is no image at"),
        ("text.jpg", "is not an image"),
        ("empty.jpg", "is not an image"),
        ("cut.jpg", "can't be decoded"),
        ("head.jpg", "image"),
    ],
)
def test_what_is_no_image_is_named(name: str, reason: str, tmp_path: Path) -> None:
    file = spoilt(name, tmp_path)
    for given in (file, str(file)):
        with pytest.raises(InputError, match=reason) as caught:
            prepare(given, 64)
        assert str(file) in str(caught.value)


def test_a_cut_png_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    quarters(64, 64).save(file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"cut\.png"):
        load_image(file)


@pytest.mark.parametrize("side", [15, 40])
def test_a_decompression_bomb_is_refused(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bomb.png"
    quarters(side, side).save(file)
    assert load_image(file).size == (side, side)
    # Pillow warns of more than this many pixels, and refuses more than twice as many itself.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(InputError, match=r"bomb\.png has .* pixels"):
        load_image(file)
