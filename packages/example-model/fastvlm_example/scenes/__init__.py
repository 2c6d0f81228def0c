"""Made scenes of plain shapes: an image, its one exact description, and the facts in a reply."""

from fastvlm_example.scenes.describe import describe
from fastvlm_example.scenes.facts import KINDS, FactScore, Tally, score, score_all
from fastvlm_example.scenes.render import render
from fastvlm_example.scenes.scene import (
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
    "score_all",
]
