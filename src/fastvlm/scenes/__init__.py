"""Made scenes of plain shapes: an image, its one exact description, and the facts in a reply."""

from fastvlm.scenes.describe import describe
from fastvlm.scenes.facts import KINDS, FactScore, Tally, score
from fastvlm.scenes.render import render
from fastvlm.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    by_place,
    sample,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "FactScore",
    "Scene",
    "Tally",
    "Thing",
    "by_place",
    "describe",
    "render",
    "sample",
    "score",
]
