"""What a run's steps draw from, and what its optimiser trains at which rate."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn


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
