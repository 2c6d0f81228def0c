"""What a run trains: a task draws a step's examples and says what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

Validate = Callable[[int], Mapping[str, float]]
"""Measures what was learnt until a step, on what is never trained on."""


@dataclass(frozen=True, slots=True)
class Losses:
    """What some of a step's examples cost, as sums: the loop divides by the whole step's weight.

    Args:
        total: The sum of the losses, to derive.
        weight: Over how many of the task's units it is.
        report: What to report, by name: what a measure adds up to, and over how many.
    """

    total: Tensor
    weight: float
    report: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class ExampleStream(Protocol):
    """A stream of data with a position, such as `fastvlm.data.feed.Feed`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in plain types."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        ...


class TrainingTask(Protocol):
    """What a run trains."""

    module: nn.Module
    """Everything that a checkpoint must hold; what requires a gradient is trained."""
    unit: str
    """What the weight of its losses counts: tokens, images."""
    source: ExampleStream | None
    """The stream that this process draws its own examples from; None where the step's number
    decides the examples of all processes. A position is restored before the first draw."""
    plan: Mapping[str, Any]
    """All that decides what is learnt besides the schedule, in plain types: what the task was made
    of, as settings, and as digests of data and of the weights that it begins with."""
    whole: str | None
    """Why the examples of a step can't be shared out; None where they can."""

    def draw(self, step: int) -> Sequence[Any]:
        """Return a step's examples; with a source, those of this process.

        Torch's and Python's global generators are seeded for the step.
        """
        ...

    def loss(self, examples: Sequence[Any]) -> Losses:
        """Return what some of a step's examples cost.

        Torch's and Python's global generators are seeded for these examples.
        """
        ...
