"""Take a reply apart into single facts and check each against the scene.

A fact fills a slot: the colour at the top left, the number of things in a row, the relation of two
named things. A slot counts once; stating it again is wrong, so nothing is gained by repetition.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastvlm_example.scenes.describe import NUMBERS, RELATIONS, describe, holds
from fastvlm_example.scenes.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, sample

KINDS = ("size", "colour", "shape", "place", "count", "background", "relation", "unparsed")

Slot: TypeAlias = tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement of one `kind` about one `slot`, and whether it is true of the scene."""

    kind: str
    slot: Slot
    true: bool


@dataclass(frozen=True, slots=True)
class Tally:
    """How many facts were stated, how many of them are right, how many were left out."""

    stated: int = 0
    right: int = 0
    missing: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Sum two tallies."""
        return Tally(
            self.stated + other.stated, self.right + other.right, self.missing + other.missing
        )

    @property
    def accuracy(self) -> float:
        """Right facts over those stated or missing; 0 where there are none."""
        return self.right / max(1, self.stated + self.missing)


@dataclass(frozen=True, slots=True)
class FactScore:
    """A tally for each of `KINDS`, in that order; scores add up."""

    tallies: tuple[Tally, ...] = (Tally(),) * len(KINDS)

    def __add__(self, other: FactScore) -> FactScore:
        """Sum two scores kind by kind."""
        return FactScore(tuple(a + b for a, b in zip(self.tallies, other.tallies, strict=True)))

    def of(self, kind: str) -> Tally:
        """Give the tally of one of `KINDS`."""
        return self.tallies[KINDS.index(kind)]

    @property
    def total(self) -> Tally:
        """The tally over all kinds."""
        return sum(self.tallies, Tally())

    @property
    def stated(self) -> int:
        """Facts the reply states, counting a sentence that can't be parsed as one."""
        return self.total.stated

    @property
    def right(self) -> int:
        """Stated facts that are true of the scene."""
        return self.total.right

    @property
    def missing(self) -> int:
        """Facts of the scene's own description that the reply says nothing about."""
        return self.total.missing

    @property
    def accuracy(self) -> float:
        """Right facts over those stated or missing, so that both errors and omissions cost."""
        return self.total.accuracy


def _any(words: tuple[str, ...]) -> str:
    return "(" + "|".join(words) + ")"


_NAME = f"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})".replace("(", "(?:")
_TOTAL = re.compile(f"{_any(NUMBERS)} objects lie on an? {_any(BACKGROUNDS)} background")
_THING = re.compile(
    f"(?:at|in) the {_any(PLACES)} is an? {_any(SIZES)} {_any(COLOURS)} {_any(SHAPES)}"
)
_ROWS = re.compile(
    f"the top row holds {_any(NUMBERS)}, the middle row {_any(NUMBERS)}"
    f" and the bottom row {_any(NUMBERS)}"
)
_RELATION = re.compile(f"the ({_NAME}) is {_any(RELATIONS)} the ({_NAME})")


def score(reply: str, scene: Scene) -> FactScore:
    """Check every fact of `reply` against `scene`, and count those of `describe` left out."""
    stated: Counter[str] = Counter()
    right: Counter[str] = Counter()
    filled: set[Slot] = set()
    for fact in _facts(reply, scene):
        stated[fact.kind] += 1
        right[fact.kind] += fact.true and fact.slot not in filled
        filled.add(fact.slot)
    missing = Counter(
        fact.kind for fact in _facts(describe(scene), scene) if fact.slot not in filled
    )
    return FactScore(tuple(Tally(stated[kind], right[kind], missing[kind]) for kind in KINDS))


def score_all(seeds: Sequence[int], replies: Sequence[str]) -> dict[str, Any]:
    """Return the share of right facts in descriptions of scenes, in all and by kind.

    Args:
        seeds: Of the scenes, see `sample`.
        replies: A description of each.
    """
    scores = [score(reply, sample(seed)) for seed, reply in zip(seeds, replies, strict=True)]
    total = sum(scores, FactScore())
    exact = sum(one.accuracy == 1.0 for one in scores)
    return {
        "scenes": len(seeds),
        "facts_stated": total.stated,
        "facts_right": total.right,
        "facts_missing": total.missing,
        "accuracy": total.accuracy,
        "exact_descriptions": exact,
        "by_kind": {kind: total.of(kind).accuracy for kind in KINDS if total.of(kind).stated},
    }


def _facts(reply: str, scene: Scene) -> Iterator[Fact]:
    for sentence in reply.lower().split("."):
        line = " ".join(sentence.split())
        if line:
            yield from _sentence(line, scene)


def _sentence(line: str, scene: Scene) -> Iterator[Fact]:
    """Read one sentence, given in lower case with single spaces and no full stop."""
    if match := _THING.fullmatch(line):
        place, size, colour, shape = match.groups()
        there = next((thing for thing in scene.things if thing.place == place), None)
        yield Fact("size", ("size", place), there is not None and there.size == size)
        yield Fact("colour", ("colour", place), there is not None and there.colour == colour)
        yield Fact("shape", ("shape", place), there is not None and there.shape == shape)
        yield Fact("place", ("place", place), there is not None)
    elif match := _RELATION.fullmatch(line):
        one, word, two = match.groups()
        named = {thing.name: thing for thing in scene.things}
        known = one in named and two in named
        true = known and holds(named[one], word, named[two])
        yield Fact("relation", ("relation", frozenset((one, two))), true)
    elif match := _ROWS.fullmatch(line):
        for row, number in enumerate(match.groups()):
            real = sum(thing.row == row for thing in scene.things)
            yield Fact("count", ("count", row), NUMBERS[real] == number)
    elif match := _TOTAL.fullmatch(line):
        number, background = match.groups()
        yield Fact("count", ("count", "objects"), NUMBERS[len(scene.things)] == number)
        yield Fact("background", ("background",), background == scene.background)
    else:
        yield Fact("unparsed", ("unparsed", line), False)
