"""How a run goes: its length, its learning rate, how it is computed and written down."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastvlm.functional.options import Option

Steps = Annotated[int, Option("Optimiser steps in all.", "N", 1, 2**31 - 1)]
LearningRate = Annotated[
    float,
    Option("The peak of the learning rate: warm-up to it, then a cosine down.", "X", 1e-8, 1),
]
Seed = Annotated[int, Option("Decides every draw of the run.", "N", 0, 2**63 - 1)]
Accumulation = Annotated[
    int,
    Option("Slices in which a step is computed: more of them need less memory.", "N", 1, 4096),
]

COMPUTATION_FIELDS = frozenset({"accumulation", "trackers", "validation_steps", "workers"})
"""Settings that say how a run is computed and written down, besides its intervals in seconds."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a run goes: its length, its learning rate, how it is computed and written down.

    Args:
        steps: Optimiser steps in all.
        learning_rate: The peak, reached after `warmup` steps, then a cosine down to 2 %.
        warmup: Steps of linear warm-up.
        weight_decay: AdamW's, on matrices and kernels only.
        clip: The largest norm of the gradient.
        seed: Decides every draw of the run.
        precision: `no` for the weights' own or `bf16`; None for what accelerate is set to.
        accumulation: Slices in which each process computes a step, one after the other: more of
            them need less memory, and change the gradient by rounding alone.
        validation_steps: Steps between two validations; the last step has one too.
        checkpoint_seconds: Time between two checkpoints.
        log_seconds: Time between two progress lines.
        trackers: Where accelerate writes the figures too: `tensorboard`, `wandb` or `trackio`.
        workers: Processes that open and prepare images ahead of the steps of each process. A
            program that takes any keeps what it does under `if __name__ == "__main__":`, as they
            import it too.
    """

    steps: Steps
    learning_rate: LearningRate
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: Seed = 0
    precision: str | None = None
    accumulation: Accumulation = 1
    validation_steps: int = 200
    checkpoint_seconds: float = 120.0
    log_seconds: float = 20.0
    trackers: tuple[str, ...] = ()
    workers: int = 0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, done))))

    def plan(self) -> dict[str, Any]:
        """Return all that decides the weights, but for rounding."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in COMPUTATION_FIELDS and not name.endswith("_seconds")
        }
