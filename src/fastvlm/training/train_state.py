"""A task's weights and their optimiser: gradients of slices, then one step with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from fastvlm.training.checkpoint import State
from fastvlm.training.optimisation import parameter_groups
from fastvlm.training.processes import Processes
from fastvlm.training.schedule import Schedule
from fastvlm.training.task import Losses, TrainingTask


class TrainState:
    """A task's weights, complete in every process, and their optimiser.

    Args:
        task: What to train.
        schedule: The run's schedule.
        accelerator: Provides mixed precision.
        processes: The processes that take each step together.
    """

    def __init__(
        self, task: TrainingTask, schedule: Schedule, accelerator: Accelerator, processes: Processes
    ) -> None:
        self.task, self.schedule = task, schedule
        self.accelerator, self.processes = accelerator, processes
        self.optimiser: torch.optim.Optimizer = torch.optim.AdamW(
            parameter_groups(task.module, schedule.weight_decay), betas=(0.9, 0.98), eps=1e-7
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def losses(self, examples: Sequence[Any]) -> Losses:
        """Return the losses of examples, in the run's precision."""
        with self.accelerator.autocast():
            return self.task.loss(examples)

    def gather(self) -> None:
        """Sum each gradient over all processes."""
        self.processes.sum_gradients(self.parameters)

    def step(self, step: int, weight: float) -> None:
        """Take an optimiser step with the summed gradients.

        Args:
            step: The step's number, from 0 on.
            weight: The weight that the losses were summed over.
        """
        self.gather()
        parameters = self.parameters
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(weight)
        nn.utils.clip_grad_norm_(parameters, self.schedule.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(step) * group["rate_scale"]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def state(self) -> State:
        """Return the states of weights and optimiser; in process 0 they are complete."""
        return {"module": self.task.module.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load(self, state: State) -> None:
        """Restore what `state` returned."""
        self.task.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
