"""A tiny model, its strategies, and tasks over rendered scenes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm.cli.strategies import TypedStrategy, describe
from fastvlm.data.tasks import EvaluationTask, Item
from fastvlm.data.tasks.captioning import Captioning
from fastvlm.data.tasks.visdial import VisDial
from fastvlm.decoding import Strategy
from fastvlm.evaluation.tasks.plan import Plan
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.models import small_vlm

NAMES = ("autoregressive", "early-exit@2:3", "prompt-lookup:4")


@pytest.fixture(scope="session")
def vlm() -> VisionLanguageModel:
    return small_vlm()


@pytest.fixture
def strategies(vlm: VisionLanguageModel) -> dict[str, Strategy]:
    """Strategies whose drafts depend on nothing measured."""
    return {
        "autoregressive": vlm.strategy("autoregressive"),
        "early-exit@2:3": vlm.strategy(
            "early-exit", exit_layer=2, num_speculative_tokens=3, confidence=0.0
        ),
        "prompt-lookup:4": vlm.strategy("prompt-lookup", num_speculative_tokens=4, confidence=0),
    }


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        render(sample(seed), 128).save(path)
    return paths


@pytest.fixture
def captions(images: list[Path]) -> Captioning:
    items = tuple(Item(path.stem, "Describe the picture.", path) for path in images)
    said = ["a small red square", "a large blue circle", "a square above a circle"]
    return Captioning(
        "Scenes", items, {item.id: [text] for item, text in zip(items, said, strict=True)}
    )


@pytest.fixture
def dialogue(images: list[Path]) -> VisDial:
    options = ("red", "a large blue circle", "a small square")
    items = (
        Item("0/1", "What is it?", images[0], options),
        Item("1/1", "And that?", images[1], options),
    )
    return VisDial(items, {"0/1": 1, "1/1": 0}, {"1/1": [1.0, 0.5, 0.0]})


@pytest.fixture
def planned(strategies: dict[str, Strategy]) -> Callable[..., Plan]:
    """Return a function that plans tasks with these strategies."""

    def plan(
        tasks: dict[str, EvaluationTask[Any]], sizes: tuple[int | None, ...] = (None,)
    ) -> Plan:
        known = ["autoregressive", "early-exit", "prompt-lookup"]
        described = {
            name: describe(TypedStrategy.of(name, known), strategy)
            for name, strategy in strategies.items()
        }
        return Plan("tiny", tasks, described, sizes, 10, "float32", 1)

    return plan


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]
