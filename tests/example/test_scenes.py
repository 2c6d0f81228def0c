"""Scenes: images that show what is said, descriptions that score in full, errors that cost."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from fastvlm_example.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    FactScore,
    Scene,
    Thing,
    by_place,
    describe,
    render,
    sample,
    score,
)
from fastvlm_example.scenes.render import PALETTE, TINT

if TYPE_CHECKING:
    from PIL import Image

SCENE = Scene(
    (
        Thing("small", "red", "circle", "top left"),
        Thing("large", "red", "cross", "top right"),
        Thing("large", "blue", "square", "centre"),
        Thing("small", "green", "cross", "bottom left"),
    ),
    "grey",
    7,
)
TEXT = (
    "Four objects lie on a grey background. "
    "At the top left is a small red circle. At the top right is a large red cross. "
    "In the centre is a large blue square. At the bottom left is a small green cross. "
    "The top row holds two, the middle row one and the bottom row one. "
    "The small red circle is above the small green cross. "
    "The large red cross is right of the small red circle. "
    "The small green cross is below the large red cross."
)


def test_a_scene_follows_from_its_seed() -> None:
    scenes = [sample(seed) for seed in range(300)]
    assert scenes == [sample(seed) for seed in range(300)]
    assert len({(scene.things, scene.background) for scene in scenes}) == 300
    assert {len(scene.things) for scene in scenes} == {4, 5, 6}


def test_by_place_lists_nine_cells() -> None:
    cells = by_place(SCENE)
    assert [cell.name if cell else None for cell in cells] == [
        "small red circle", None, "large red cross",
        None, "large blue square", None,
        "small green cross", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "things",
    [
        SCENE.things[:3],
        SCENE.things[::-1],
        (*SCENE.things, Thing("large", "red", "circle", "bottom left")),
        (*SCENE.things, Thing("small", "red", "circle", "bottom right")),
    ],
    ids=["few", "order", "place", "alike"],
)
def test_an_ambiguous_scene_is_refused(things: tuple[Thing, ...]) -> None:
    with pytest.raises(ValueError, match=r"thing|places"):
        Scene(things, "grey", 0)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="'teal' is not one of red"):
        Thing("small", "teal", "circle", "centre")
    with pytest.raises(ValueError, match="'teal' is not one of grey"):
        Scene(SCENE.things, "teal", 0)


def test_the_description_is_exact() -> None:
    assert describe(SCENE) == TEXT
    assert describe(dataclasses.replace(SCENE, seed=8)) == TEXT


def test_length_stays_between_60_and_120() -> None:
    lengths = [len(re.findall(r"\w+|[^\w\s]", describe(sample(seed)))) for seed in range(2000)]
    assert min(lengths) >= 60
    assert max(lengths) <= 120


def test_a_description_scores_in_full() -> None:
    scores = [score(describe(scene), scene) for scene in map(sample, range(500))]
    assert all(one.accuracy == 1.0 and one.missing == 0 for one in scores)
    whole = sum(scores, FactScore())
    assert whole.stated == whole.right == sum(one.stated for one in scores)
    assert whole.of("unparsed").stated == 0
    # Four facts a thing.
    things = sum(len(sample(seed).things) for seed in range(500))
    assert [whole.of(kind).right for kind in ("size", "colour", "shape", "place")] == [things] * 4


@pytest.mark.parametrize(
    ("before", "after", "stated", "wrong", "missing"),
    [
        ("a large blue", "a large green", 24, 1, 0),
        ("a large blue", "a small blue", 24, 1, 0),
        ("blue square", "blue star", 24, 1, 0),
        # An empty cell: four facts of a thing that isn't there, four of the one left out.
        ("In the centre", "At the bottom right", 24, 4, 4),
        # A cell that is taken: the first to be stated has it.
        ("In the centre", "At the top right", 24, 4, 4),
        ("Four objects", "Five objects", 24, 1, 0),
        ("grey", "mint", 24, 1, 0),
        ("top row holds two", "top row holds three", 24, 1, 0),
        ("middle row one", "middle row none", 24, 1, 0),
        # A row left out leaves a sentence that can't be parsed, and three rows unsaid.
        (", the middle row one and", " and", 22, 1, 3),
        ("circle is above", "circle is below", 24, 1, 0),
        # They share a column, so neither is strictly left of the other.
        ("circle is above", "circle is left of", 24, 1, 0),
        # True, though not what `describe` says first.
        ("cross is below", "cross is left of", 24, 0, 0),
        # No such thing.
        ("The large red cross", "The large red star", 24, 1, 1),
        (" In the centre is a large blue square.", "", 20, 0, 4),
        # The thing before its place: not how `describe` puts it.
        ("In the centre is a large blue square", "A large blue square is in the centre", 21, 1, 4),
        ("In the centre is a large", "In the is a large", 21, 1, 4),
        ("In the centre is a large", "In the centre is large", 21, 1, 4),
        (" The small green cross is below the large red cross.", "", 23, 0, 1),
        ("row one.", "row one. Red red the of.", 25, 1, 0),
        (
            "the bottom row one.",
            "the bottom row one. Four objects lie on a grey background.",
            26,
            2,
            0,
        ),
        ("the large red cross.", "the large", 24, 1, 1),
    ],
)
def test_each_corruption_costs(
    before: str, after: str, stated: int, wrong: int, missing: int
) -> None:
    assert TEXT.count(before) == 1
    found = score(TEXT.replace(before, after), SCENE)
    assert (found.stated, found.stated - found.right, found.missing) == (stated, wrong, missing)
    assert found.accuracy == pytest.approx((stated - wrong) / (stated + missing))


def test_every_word_swapped_costs() -> None:
    words = [*SIZES, *COLOURS, *SHAPES, *PLACES, "above", "below", "left of", "right of"]
    for seed in range(20):
        scene = sample(seed)
        other = next(sample(s) for s in range(seed + 1, 99) if sample(s).things != scene.things)
        assert score(describe(other), scene).accuracy < 0.7
        text = describe(scene)
        for word in words:
            garbled = re.sub(rf"\b{word}\b", "what", text)
            assert garbled == text or score(garbled, scene).accuracy < 1


@pytest.mark.parametrize("reply", ["", "Red. Red circle. The the.", "four red grey square centre"])
def test_babble_scores_nothing(reply: str) -> None:
    found = score(reply, SCENE)
    assert (found.right, found.accuracy, found.missing) == (0, 0.0, 24)


def test_case_and_spacing_do_not_matter() -> None:
    assert score(TEXT.lower().replace(". ", ".\n"), SCENE).accuracy == 1.0


def test_scores_add() -> None:
    both = score(TEXT, SCENE) + score("", SCENE)
    assert (both.stated, both.right, both.missing, both.accuracy) == (24, 24, 24, 0.5)
    assert both.of("relation").missing == 3
    assert FactScore().accuracy == 0.0


@pytest.mark.parametrize("size", [64, 192, 256])
def test_a_image_follows_from_its_scene(size: int) -> None:
    image = render(SCENE, size)
    assert (image.mode, image.size) == ("RGB", (size, size))
    assert image.tobytes() == render(SCENE, size).tobytes()
    assert image.tobytes() != render(dataclasses.replace(SCENE, seed=8), size).tobytes()


def test_an_odd_size_is_refused() -> None:
    for size in (0, -64, 100):
        with pytest.raises(ValueError, match=f"size {size}: want"):
            render(SCENE, size)


def _shown(cell: Image.Image) -> dict[str, int]:
    """How many pixels of a cell are of each named colour, give or take the tint."""
    raw = cell.tobytes()
    colours = Counter(zip(raw[::3], raw[1::3], raw[2::3], strict=True))
    near = {
        name: sum(n for pixel, n in colours.items() if math.dist(pixel, named) <= 2 * TINT)
        for name, named in PALETTE.items()
    }
    return {name: count for name, count in near.items() if count > 8}


def test_each_cell_shows_its_thing_alone() -> None:
    for seed in range(40):
        scene = sample(seed)
        image = render(scene)
        for cell, thing in enumerate(by_place(scene)):
            x, y = cell % 3 * 64, cell // 3 * 64
            shown = _shown(image.crop((x, y, x + 64, y + 64)))
            assert list(shown) == ([thing.colour] if thing else [])
            if thing:
                assert (shown[thing.colour] > 430) == (thing.size == "large")
