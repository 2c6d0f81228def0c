"""How a run goes: its length, its learning rates, and what each step draws."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

HOW = frozenset({"accumulation", "trackers", "validation_steps", "workers"})
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

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    precision: str | None = None
    accumulation: int = 1
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
            if name not in HOW and not name.endswith("_seconds")
        }


def seed_step(seed: int, step: int, part: int = 0) -> None:
    """Seed torch's and Python's generators for one step of a run.

    Args:
        seed: The run's.
        step: The step's number.
        part: 0 for what the step draws, then a number for each slice of it.
    """
    generator = step_random(seed, step, part)
    torch.manual_seed(generator.getrandbits(63))
    random.setstate(generator.getstate())


def step_random(seed: int, step: int, part: int = 0) -> random.Random:
    """Return a generator that is seeded as Python's is for a step. See `seed_step`."""
    return random.Random(f"{seed}/{step}/{part}")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: decay for tensors of two or more dimensions, none for the rest.

    A module with an attribute `rate_scale` trains at that multiple of the run's learning rate.
    """
    scales: dict[nn.Parameter, float] = {}
    for part in module.modules():
        scale: Any = getattr(part, "rate_scale", None)
        if scale is not None:
            scales |= dict.fromkeys(part.parameters(), float(scale))
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            dimensions = sum(size > 1 for size in parameter.shape)
            key = (dimensions > 1, scales.get(parameter, 1.0))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if decays else 0.0, "rate_scale": scale}
        for (decays, scale), group in groups.items()
    ]
