"""The stages of a model's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastvlm.training.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a model's training: what its steps show.

    Args:
        name: Its name, and the folder of its checkpoint and log.
        schedule: Its length and learning rate.
        scenes: Scenes in a step.
        photos: Photos in a step, each in two conversations.
        sampled: Photos in a step of which the model's own sentences are rewarded.
        described: Photos in a step of which the model's own descriptions must not repeat a thing.
        shortened: The share of scenes' descriptions that end with the last thing.
        tunes_encoder: Whether the encoder learns too.
    """

    name: str
    schedule: Schedule
    scenes: int = 0
    photos: int = 0
    sampled: int = 0
    described: int = 0
    shortened: float = 0.0
    tunes_encoder: bool = False


STAGES = (
    # Scenes alone. Looking at the place that a sentence names, and repeating what was said before,
    # are learnt from scenes, where they decide every word; photos hardly teach them.
    Stage(
        "scenes",
        Schedule(steps=450, learning_rate=1e-3, warmup=50),
        scenes=8,
        shortened=0.75,
    ),
    Stage(
        "together",
        # Slices of rows of like length, which take two thirds of the time of one.
        Schedule(steps=1500, learning_rate=1.2e-3, warmup=30, accumulation=3),
        scenes=3,
        photos=14,
    ),
    Stage(
        "consensus",
        Schedule(steps=140, learning_rate=3e-4, warmup=5),
        scenes=2,
        photos=3,
        sampled=16,
        described=8,
    ),
)
"""The stages of a model's training, in their order.

The encoder is frozen throughout, unless `--tune-encoder` is given. Trained along with an untrained
decoder it forgot what it knew: a linear probe read the shapes of scenes with 97 % before and 49 %
after 1,100 steps.
"""


def scaled(stages: Sequence[Stage], share: float, **settings: Any) -> list[Stage]:
    """Return stages with a share of their steps, and other settings of their schedules."""
    return [
        replace(
            stage,
            schedule=replace(
                stage.schedule, steps=max(1, round(share * stage.schedule.steps)), **settings
            ),
        )
        for stage in stages
    ]
