"""Odd, broken and hostile files: each gives the right image or one clear sentence, soon."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

RED = (200, 30, 40)
SECONDS = 20
MOST_BYTES = 2**30


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as a file's contents."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def flat(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Return a red image in a mode."""
    return Image.new("RGB", size, RED).convert(mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """Return a PNG of any declared size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def transparent() -> Image.Image:
    """Return a palette image, red and opaque, with one transparent entry that is not used."""
    image = flat("P")
    image.info["transparency"] = 255
    return image


def commented() -> bytes:
    """Return a PNG with a comment that is small in the file and very large unpacked."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 80_000_000, zip=True)
    return saved(flat(), "png", pnginfo=info)


def pages(kind: str, **options: object) -> bytes:
    """Return a file of two images, of which the first is red."""
    other = Image.new("RGB", (40, 30))
    return saved(flat(), kind, save_all=True, append_images=[other], **options)


def turned(text: bytes = b"") -> bytes:
    """Return a JPEG with an orientation, and bytes in its metadata that are none."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = saved(flat(), "jpeg", exif=exif)
    return whole.replace(b"Exif\0\0II*\0", b"Exif\0\0" + text) if text else whole


SHOWN: dict[str, Callable[[], bytes]] = {
    "grey-alpha.png": lambda: saved(flat("LA"), "png"),
    "alpha.png": lambda: saved(flat("RGBA"), "png"),
    "palette.gif": lambda: saved(flat("P"), "gif"),
    "palette-alpha.png": lambda: saved(transparent(), "png"),
    "cmyk.jpg": lambda: saved(flat("CMYK"), "jpeg"),
    "cmyk.tif": lambda: saved(flat("CMYK"), "tiff"),
    "ycbcr.jpg": lambda: saved(flat("YCbCr"), "jpeg"),
    "lab.tif": lambda: saved(flat(), "tiff", compression="tiff_lzw"),
    "progressive.jpg": lambda: saved(flat(), "jpeg", progressive=True),
    "animated.gif": lambda: pages("gif"),
    "animated.webp": lambda: pages("webp", lossless=True),
    "pages.tif": lambda: pages("tiff"),
    "one-pixel.png": lambda: saved(flat(size=(1, 1)), "png"),
    "very-wide.png": lambda: saved(flat(size=(24_000, 1500)), "png", compress_level=1),
    "very-tall.png": lambda: saved(flat(size=(1500, 24_000)), "png", compress_level=1),
    "eighty-megapixels.png": lambda: saved(flat("RGBA", (9000, 8900)), "png", compress_level=1),
    "junk-after.jpg": lambda: saved(flat(), "jpeg") + b"<script>" * 1000,
    "no-suffix": lambda: saved(flat(), "png"),
    "wrong suffix é.gif": lambda: saved(flat(), "jpeg"),
    "turned.jpg": turned,
    "broken-metadata.jpg": lambda: turned(b"XX*\0"),
    "broken-profile.png": lambda: saved(flat(), "png", icc_profile=b"no profile at all"),
}
REFUSED: dict[str, Callable[[], bytes]] = {
    "empty.jpg": lambda: b"",
    "words.png": lambda: b"These are words.",
    "drawing.svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "document.pdf": lambda: b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "archive.jpg": lambda: b"PK\x03\x04" + bytes(60),
    "head.png": lambda: saved(flat(), "png")[:40],
    "cut.jpg": lambda: saved(flat(size=(400, 300)), "jpeg")[:-900],
    "cut.gif": lambda: saved(flat("P", (400, 300)), "gif")[:-60],
    "cut.webp": lambda: saved(Image.effect_noise((400, 300), 90), "webp")[:-900],
    "cut.tif": lambda: saved(flat(size=(400, 300)), "tiff")[:-9000],
    "declared-bomb.png": lambda: png(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(99)))),
    "declared-bomb.bmp": lambda: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6)
    ),
    "no-size.png": lambda: png(0, 0, chunk(b"IDAT", zlib.compress(b""))),
    "no-pixels.png": lambda: png(40, 30),
    "wrong-sum.png": lambda: saved(flat(), "png").replace(b"IDAT", b"IDAU"),
    "comment-bomb.png": commented,
}
SCRIPT = """
import json, resource, signal, sys
from fastvlm.functional.errors import InputError
from fastvlm.vision.images import prepare
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for file in sys.argv[1:]:
    signal.alarm(SECONDS)
    try:
        [pixels] = prepare(file, 64)
        found = [round(255 * value) for value in pixels[:, 32, 32].tolist()]
    except InputError as error:
        found = str(error)
    signal.alarm(0)
    print(json.dumps([found, peak() - before]), flush=True)
""".replace("SECONDS", str(SECONDS))


def test_thirty_files_and_more(tmp_path: Path) -> None:
    for name, contents in (SHOWN | REFUSED).items():
        (tmp_path / name).write_bytes(contents())
    names = [*SHOWN, *REFUSED]
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    names += ["pipe.png", "loop.png"]
    assert len(names) >= 30
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        check=False,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(names), f"{names[len(told)]} ended it: {done.stderr[-500:]}"
    for name, (found, taken) in zip(names, told, strict=True):
        assert taken < MOST_BYTES, name
        if name in SHOWN:
            expected = RED if "grey" not in name else (82,) * 3
            assert found == pytest.approx(expected, abs=14), name
        else:
            assert isinstance(found, str), name
            assert name in found
            assert found.count(". ") == 0, found
