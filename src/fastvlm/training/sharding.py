"""Sharded training with FSDP, for models too large for one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from fastvlm.functional.errors import InputError
from fastvlm.training.checkpoint import State
from fastvlm.training.processes import Processes, this_process
from fastvlm.training.schedule import Schedule
from fastvlm.training.task import Losses, TrainingTask
from fastvlm.training.train_state import TrainState

FULL_STATE_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)
# Weights that never had a gradient have no state.
PARTIAL_STATE_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def is_sharded_run() -> bool:
    """Return whether accelerate is configured for FSDP, in a run of several processes."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and this_process().num_processes > 1


def whole_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's state; if it is sharded, all of it in process 0 and nothing elsewhere.

    Every process has to call this.
    """
    return (
        get_model_state_dict(module, options=FULL_STATE_OPTIONS)
        if sharded(module)
        else module.state_dict()
    )


def sharded(module: nn.Module) -> bool:
    """Return whether a module's weights are sharded."""
    return isinstance(module, FSDPModule)


class ShardedTrainState(TrainState):
    """Sharded weights and their optimiser.

    Layers of the classes that accelerate's configuration names are gathered one at a time. Either
    every process needs all trained weights in a step, or none does, as FSDP requires.

    Args:
        task: What to train.
        schedule: The run's schedule.
        accelerator: Provides mixed precision.
        processes: The processes that take each step together.

    Raises:
        InputError: The task's module is not a model that can be sharded.
    """

    def __init__(
        self, task: TrainingTask, schedule: Schedule, accelerator: Accelerator, processes: Processes
    ) -> None:
        module: Any = task.module
        if type(module) in (nn.ModuleList, nn.ModuleDict):
            raise InputError(
                "FSDP shares out one whole model, and what is trained here is none; launch this"
                " without FSDP."
            )
        if not sharded(module):
            mesh = init_device_mesh(this_process().device.type, (processes.number,))
            named = FullyShardedDataParallelPlugin().transformer_cls_names_to_wrap or []
            for part in list(module.modules()):
                if type(part).__name__ in named:
                    fully_shard(part, mesh=mesh)
            fully_shard(module, mesh=mesh)
        # A task calls parts of its module: what gathers the rest is this method's hook.
        module.sliced_losses = self.sliced_losses
        register_fsdp_forward_method(module, "sliced_losses")
        super().__init__(task, schedule, accelerator, processes)

    def losses(self, examples: Sequence[Any]) -> Losses:
        """Return the losses of examples, in the run's precision."""
        return Losses(*cast(Any, self.task.module).sliced_losses(examples))

    def sliced_losses(self, examples: Sequence[Any]) -> tuple[Tensor, float, Any]:
        """Return the losses of examples as a tuple, in which FSDP finds the tensor."""
        losses = super().losses(examples)
        return losses.total, losses.weight, losses.report

    def gather(self) -> None:
        """Make each gradient the sum over all processes; FSDP has made it the mean."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self.processes.number)

    def state(self) -> State:
        """Return the states of weights and optimiser; in process 0 they are complete."""
        optimiser = get_optimizer_state_dict(
            self.task.module, self.optimiser, options=FULL_STATE_OPTIONS
        )
        return {"module": whole_state(self.task.module), "optimiser": optimiser}

    def load(self, state: State) -> None:
        """Restore what `state` returned."""
        set_model_state_dict(self.task.module, state["module"], options=FULL_STATE_OPTIONS)
        set_optimizer_state_dict(
            self.task.module, self.optimiser, state["optimiser"], options=PARTIAL_STATE_OPTIONS
        )
