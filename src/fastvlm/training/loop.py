"""One training loop for every stage: seeded, resumable, with progress.

What a step draws depends on the run's seed and the step's number alone, so a run that is resumed
goes on exactly where it stopped.
"""

from __future__ import annotations

import json
import math
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastvlm.functional.errors import CheckpointError, FastVlmError


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a run goes: its length, its learning rate, and how often it is written down.

    Args:
        steps: Optimiser steps in all.
        learning_rate: The peak, reached after `warmup` steps, then a cosine down to 2 %.
        warmup: Steps of linear warm-up.
        weight_decay: AdamW's, on matrices and kernels only.
        clip: The largest norm of the gradient.
        seed: Decides every draw of the run.
        checkpoint_seconds: Time between two checkpoints.
        log_seconds: Time between two progress lines.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    checkpoint_seconds: float = 120.0
    log_seconds: float = 20.0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, done))))


class Task(Protocol):
    """What a run trains."""

    module: nn.Module
    """Everything that a checkpoint must hold; what requires a gradient is trained."""

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return a step's loss and what to report of it.

        Torch's and Python's global generators are seeded for the step already.
        """
        ...


class StoppedError(FastVlmError):
    """The run was asked to stop; its checkpoint is written."""


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
            key = (parameter.squeeze().dim() > 1, scales.get(parameter, 1.0))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if decays else 0.0, "rate_scale": scale}
        for (decays, scale), group in groups.items()
    ]


def seed_step(seed: int, step: int) -> None:
    """Seed torch's and Python's generators for one step of a run."""
    torch.manual_seed(seed * 1_000_003 + step)
    random.seed(f"{seed}/{step}")


def write_checkpoint(path: Path, state: object) -> None:
    """Write beside the file, then rename, so that a kill leaves the old or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    beside.replace(path)


def train(task: Task, schedule: Schedule, output: Path) -> None:
    """Run a task to its last step, resuming from `output/checkpoint.pt` where there is one.

    Progress goes to standard error and, one JSON object a line, to `output/log.jsonl`.

    Raises:
        StoppedError: SIGTERM or Ctrl-C arrived; the checkpoint is written.
        CheckpointError: The checkpoint belongs to a run with another schedule.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "checkpoint.pt"
    optimiser = torch.optim.AdamW(
        parameter_groups(task.module, schedule.weight_decay), betas=(0.9, 0.98), eps=1e-7
    )
    # All that decides the weights; how often they are written down does not.
    settings = asdict(schedule).items()
    plan = {name: value for name, value in settings if not name.endswith("_seconds")}
    first = 0
    if file.is_file():
        state = torch.load(file, weights_only=True)
        if state["plan"] != plan:
            raise CheckpointError(
                f"{file} was made by a run with {state['plan']}, but this one has {plan}; resume"
                " with the same options or choose another output."
            )
        task.module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]

    stop: list[int] = []

    def ask(signum: int, _: FrameType | None) -> None:
        stop.append(signum)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def save(step: int) -> None:
        write_checkpoint(
            file,
            {
                "plan": plan,
                "step": step,
                "module": task.module.state_dict(),
                "optimiser": optimiser.state_dict(),
            },
        )

    # The tiny gradients of layer scales and of saturated losses would otherwise be computed as
    # denormals, which costs a CPU up to 2.5x.
    torch.set_flush_denormal(True)
    progress = Progress(schedule, first, output / "log.jsonl")
    saved = time.monotonic()
    try:
        for step in range(first, schedule.steps):
            seed_step(schedule.seed, step)
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(step) * group["rate_scale"]
            loss, report = task.loss(step)
            loss.backward()
            clipped = [p for group in optimiser.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(clipped, schedule.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            progress.add(step, {"loss": float(loss.detach()), **report})
            if stop or time.monotonic() - saved > schedule.checkpoint_seconds:
                save(step + 1)
                saved = time.monotonic()
            if stop:
                raise StoppedError(
                    f"Stopped after step {step + 1} of {schedule.steps}; run the same command again"
                    " to go on from there."
                )
        save(schedule.steps)
        progress.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """Averages what steps report, and writes it every so often with the time left."""

    def __init__(self, schedule: Schedule, first: int, log: Path) -> None:
        self.schedule, self.first, self.log = schedule, first, log
        self.started = self.written = time.monotonic()
        self.sums: dict[str, list[float]] = {}
        self.step = first

    def add(self, step: int, report: dict[str, float]) -> None:
        """Take one step's report."""
        self.step = step + 1
        for name, value in report.items():
            self.sums.setdefault(name, []).append(value)
        if time.monotonic() - self.written > self.schedule.log_seconds:
            self.close()

    def close(self) -> None:
        """Write what has been averaged since the last line."""
        if not self.sums:
            return
        now = time.monotonic()
        means = {name: sum(values) / len(values) for name, values in self.sums.items()}
        per_step = (now - self.started) / (self.step - self.first)
        left = int(per_step * (self.schedule.steps - self.step))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(  # noqa: T201
            f"step {self.step}/{self.schedule.steps}  {shown}  {per_step * 1e3:.0f} ms/step "
            f" {left // 60}:{left % 60:02d} left",
            file=sys.stderr,
            flush=True,
        )
        with self.log.open("a") as file:
            file.write(json.dumps({"step": self.step, **means}) + "\n")
        self.sums, self.written = {}, now
