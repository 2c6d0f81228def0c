"""Draw a scene. Quick enough (under a millisecond) to render while training."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw

from fastvlm_example.scenes.scene import GRID, Scene

Rgb: TypeAlias = tuple[int, int, int]
Point: TypeAlias = tuple[float, float]

PALETTE: dict[str, Rgb] = {
    "red": (215, 30, 35),
    "green": (25, 145, 50),
    "blue": (30, 75, 220),
    "yellow": (248, 222, 20),
    "purple": (125, 30, 150),
    "orange": (250, 130, 10),
    "black": (18, 18, 20),
    "white": (250, 250, 250),
}
BACKDROP: dict[str, Rgb] = {
    "grey": (150, 152, 155),
    "pink": (235, 160, 186),
    "beige": (210, 188, 150),
    "lilac": (182, 165, 222),
    "mint": (150, 215, 182),
}

# Radii and drifts in cells. The largest small thing is 0.6 of the smallest large one, and a
# corner (at most 1.22 radii out) plus the drift stays within half a cell.
RADIUS = {"small": (0.14, 0.18), "large": (0.30, 0.35)}
DRIFT = {"small": 0.18, "large": 0.06}
TILT = math.radians(9)
TINT = 8
SHADE = 14
SUPERSAMPLE = 3


def _spokes(*spokes: tuple[float, float]) -> tuple[Point, ...]:
    """Corners given as (degrees clockwise from the top, radii)."""
    return tuple(
        (length * math.sin(math.radians(turn)), -length * math.cos(math.radians(turn)))
        for turn, length in spokes
    )


_ARM = 0.36
OUTLINES: dict[str, tuple[Point, ...]] = {
    "square": ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
    "triangle": _spokes((0, 1.15), (122, 1.2), (238, 1.2)),
    # Taller than wide: a tilted square never looks like it.
    "diamond": ((0.0, -1.22), (0.82, 0.0), (0.0, 1.22), (-0.82, 0.0)),
    "star": _spokes(*((36 * turn, 0.5 if turn % 2 else 1.22) for turn in range(10))),
    "cross": (
        (-_ARM, -1.08),
        (_ARM, -1.08),
        (_ARM, -_ARM),
        (1.08, -_ARM),
        (1.08, _ARM),
        (_ARM, _ARM),
        (_ARM, 1.08),
        (-_ARM, 1.08),
        (-_ARM, _ARM),
        (-1.08, _ARM),
        (-1.08, -_ARM),
        (-_ARM, -_ARM),
    ),
}
REACH = 1.24


def render(scene: Scene, size: int = 192) -> Image.Image:
    """Draw `scene` as an RGB image of `size` by `size` pixels, the same one every time.

    Raises:
        ValueError: `size` is not a positive multiple of 64.
    """
    if size <= 0 or size % 64:
        raise ValueError(f"size {size}: want a positive multiple of 64")
    # Not the stream that `sample` drew from, so that jitter says nothing about the words.
    rng = random.Random(scene.seed ^ 0x5CE9E)
    image = _backdrop(BACKDROP[scene.background], size, rng)
    cell = size / GRID
    for thing in scene.things:
        radius = cell * rng.uniform(*RADIUS[thing.size])
        drift = cell * DRIFT[thing.size]
        x = (thing.column + 0.5) * cell + rng.uniform(-drift, drift)
        y = (thing.row + 0.5) * cell + rng.uniform(-drift, drift)
        angle = rng.uniform(-TILT, TILT)
        left, top = math.floor(x - REACH * radius), math.floor(y - REACH * radius)
        width = math.ceil(2 * REACH * radius) + 1
        mask = _mask(OUTLINES.get(thing.shape), (x - left, y - top), radius, angle, width)
        image.paste(_vary(PALETTE[thing.colour], TINT, rng), (left, top), mask)
    return image


def _vary(colour: Rgb, by: int, rng: random.Random) -> Rgb:
    red, green, blue = (min(255, max(0, c + rng.randint(-by, by))) for c in colour)
    return red, green, blue


def _backdrop(colour: Rgb, size: int, rng: random.Random) -> Image.Image:
    """Blend four corner colours into a soft gradient.

    Corners differ mostly in lightness, since a cast could pass for another background.
    """
    corners = Image.new("RGB", (2, 2))
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        shade = rng.randint(-SHADE, SHADE)
        red, green, blue = _vary(colour, 2, rng)
        corners.putpixel(corner, (red + shade, green + shade, blue + shade))
    return corners.resize((size, size), Image.Resampling.BILINEAR)


def _mask(
    outline: Sequence[Point] | None, centre: Point, radius: float, angle: float, width: int
) -> Image.Image:
    """Coverage of a shape (None: a circle), drawn large and averaged down for smooth edges."""
    x, y = centre[0] * SUPERSAMPLE, centre[1] * SUPERSAMPLE
    reach = radius * SUPERSAMPLE
    mask = Image.new("L", (width * SUPERSAMPLE, width * SUPERSAMPLE))
    draw = ImageDraw.Draw(mask)
    if outline is None:
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=255)
    else:
        along, across = reach * math.cos(angle), reach * math.sin(angle)
        draw.polygon(
            [(x + along * u - across * v, y + across * u + along * v) for u, v in outline],
            fill=255,
        )
    return mask.reduce(SUPERSAMPLE)
