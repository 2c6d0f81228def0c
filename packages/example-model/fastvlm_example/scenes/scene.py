"""What is in an image: four to six things on a 3x3 grid, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
PLACES = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)
BACKGROUNDS = ("grey", "pink", "beige", "lilac", "mint")

GRID = 3
FEWEST, MOST = 4, 6


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: a word of each of `SIZES`, `COLOURS`, `SHAPES` and `PLACES`.

    Raises:
        ValueError: a word is not of its list.
    """

    size: str
    colour: str
    shape: str
    place: str

    def __post_init__(self) -> None:
        for word, known in (
            (self.size, SIZES),
            (self.colour, COLOURS),
            (self.shape, SHAPES),
            (self.place, PLACES),
        ):
            if word not in known:
                raise ValueError(f"{word!r} is not one of {', '.join(known)}")

    @property
    def name(self) -> str:
        """What it is called, without its place: "small red circle"."""
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def row(self) -> int:
        """Its row of the grid, 0 at the top."""
        return PLACES.index(self.place) // GRID

    @property
    def column(self) -> int:
        """Its column of the grid, 0 at the left."""
        return PLACES.index(self.place) % GRID


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in reading order of place, no two in one place or of one name.

    `seed` settles what a description leaves open: exact position, radius, angle and tint.

    Raises:
        ValueError: too few or too many things, an unknown background, things out of
            reading order, a place taken twice, or two things with the same name.
    """

    things: tuple[Thing, ...]
    background: str
    seed: int

    def __post_init__(self) -> None:
        if not FEWEST <= len(self.things) <= MOST:
            raise ValueError(f"{len(self.things)} things; a scene has {FEWEST} to {MOST}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"{self.background!r} is not one of {', '.join(BACKGROUNDS)}")
        cells = [PLACES.index(thing.place) for thing in self.things]
        if cells != sorted(set(cells)):
            places = ", ".join(thing.place for thing in self.things)
            raise ValueError(f"places {places}: want distinct ones in reading order")
        if len({thing.name for thing in self.things}) < len(self.things):
            names = ", ".join(thing.name for thing in self.things)
            raise ValueError(f"things {names}: want no two alike")


def sample(seed: int) -> Scene:
    """Draw the scene that belongs to `seed`; it depends on nothing else."""
    rng = random.Random(seed)
    cells = sorted(rng.sample(range(len(PLACES)), rng.randint(FEWEST, MOST)))
    things: list[Thing] = []
    names: set[str] = set()
    for cell in cells:
        while True:
            thing = Thing(rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES), PLACES[cell])
            if thing.name not in names:
                break
        names.add(thing.name)
        things.append(thing)
    return Scene(tuple(things), rng.choice(BACKGROUNDS), seed)


def by_place(scene: Scene) -> list[Thing | None]:
    """For each of the nine `PLACES` the thing there, or None."""
    found = {thing.place: thing for thing in scene.things}
    return [found.get(place) for place in PLACES]
