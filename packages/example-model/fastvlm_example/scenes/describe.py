"""The one exact description of a scene, settled by what can be seen in its image."""

from __future__ import annotations

from fastvlm_example.scenes.scene import GRID, Scene, Thing

NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("above", "below", "left of", "right of")

# Which things are compared (by index in reading order), and whether rows come before columns.
# The scene with most things states one fewer, which holds every description to 120 tokens.
COMPARED = ((0, -1, True), (1, 0, False), (-1, 1, True))
COMPARED_WHEN_FULL = COMPARED[:2]
FULL = 6


def describe(scene: Scene) -> str:
    """Describe `scene`: the count, each thing in reading order, the rows, then relations."""
    things = scene.things
    lines = [f"{NUMBERS[len(things)]} objects lie on a {scene.background} background"]
    # The place comes first: whoever reads the image then looks there for what is said next.
    lines += [f"{where(thing.place)} is a {thing.name}" for thing in things]
    # Counted by row, and not by colour or shape: how many are red was hardly learnt by a model of
    # ten million parameters (half of these counts were right where all else was exact).
    top, middle, bottom = (
        NUMBERS[sum(thing.row == row for thing in things)] for row in range(GRID)
    )
    lines.append(f"the top row holds {top}, the middle row {middle} and the bottom row {bottom}")
    for subject, other, rows_first in COMPARED_WHEN_FULL if len(things) >= FULL else COMPARED:
        one, two = things[subject], things[other]
        lines.append(f"the {one.name} is {relation(one, two, rows_first)} the {two.name}")
    return " ".join(f"{line.capitalize()}." for line in lines)


def where(place: str) -> str:
    """Put the preposition before a place: "at the top left", "in the centre"."""
    return f"{'in' if place == 'centre' else 'at'} the {place}"


def relation(one: Thing, two: Thing, rows_first: bool) -> str:
    """How `one` lies to `two`, by the preferred axis, or by the other where that one ties."""
    vertical = RELATIONS[one.row > two.row]
    horizontal = RELATIONS[2 + (one.column > two.column)]
    by_row = one.row != two.row and (rows_first or one.column == two.column)
    return vertical if by_row else horizontal


def holds(one: Thing, word: str, two: Thing) -> bool:
    """Whether the relation `word`, one of `RELATIONS`, strictly holds on the grid."""
    return {
        "above": one.row < two.row,
        "below": one.row > two.row,
        "left of": one.column < two.column,
        "right of": one.column > two.column,
    }[word]
