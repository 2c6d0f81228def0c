"""The processes of a distributed run: exchanging objects and summing gradients."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed, nn

from fastvlm.functional.errors import FastVlmError, InputError

Said = TypeVar("Said")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""The timeout of a silent process; one that ends is noticed at once."""
PREPARATION_TIMEOUT = timedelta(days=1)
"""The timeout before the run, while one process may be busy alone, such as decoding replies."""


class LostProcessError(FastVlmError):
    """Another process of the run ended, or can't be reached."""


def this_process() -> PartialState:
    """Return this process's rank among those that `accelerate launch` or `torchrun` started."""
    # Accelerate takes processes without an accelerator for a run of their own, unless it is told.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PREPARATION_TIMEOUT)


def compute_on(device: str | None) -> None:
    """Set the device of this process's run.

    Args:
        device: A device such as `cpu` or `cuda:1`; without an index, that of the process's own
            number. None for accelerate's setting.

    Raises:
        InputError: The process already uses another device, or several would share one.
    """
    if device is None:
        return
    wanted = torch.device(device)
    if wanted.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif wanted.index is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    state = this_process()
    if wanted.type != "cpu" and wanted.index is not None and state.num_processes > 1:
        raise InputError(
            f"Each of {state.num_processes} processes has an accelerator of its own; leave the"
            f" number out of --device {device}."
        )
    found = state.device
    if found.type != wanted.type or wanted.index not in (None, found.index):
        raise InputError(f"This process computes on {found} already; {device} was asked for.")


@contextmanager
def process_0_first() -> Iterator[None]:
    """Run a context in process 0 before the other processes, which can then reuse its results.

    Raises:
        LostProcessError: Another process ended meanwhile.
    """
    state = this_process()
    if not state.is_main_process:
        with reached():
            state.wait_for_everyone()
    yield
    if state.is_main_process:
        with reached():
            state.wait_for_everyone()


@contextmanager
def reached() -> Iterator[None]:
    """Turn torch's errors about a lost process into a `LostProcessError`.

    Raises:
        LostProcessError: Another process ended, or has been silent for too long.
    """
    try:
        yield
    except RuntimeError as error:
        state = this_process()
        raise LostProcessError(
            f"Process {state.process_index} of {state.num_processes} has lost another one, which"
            " ended or has gone silent; see what that one said, and run the same command again to"
            " go on from the last checkpoint."
        ) from error


class Processes:
    """This process and the others of a run, which take each step together."""

    def __init__(self) -> None:
        state = this_process()
        self.index, self.number = state.process_index, state.num_processes
        self.group: distributed.ProcessGroup | None = None
        if self.number > 1:
            # Apart from the gradients' own, so that what is told never waits on a device.
            with reached():
                self.group = distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def tell(self, mine: Said) -> list[Said]:
        """Send an object to all processes; return each process's object, in order of rank.

        Every process has to call this.

        Raises:
            LostProcessError: A process doesn't.
        """
        if self.group is None:
            return [mine]
        said = [mine] * self.number
        with reached():
            distributed.all_gather_object(said, mine, group=self.group)
        return said

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes.

        Raises:
            LostProcessError: A process can't be reached.
        """
        if self.group is None:
            return
        parameters = list(parameters)
        # What no process has a gradient for keeps none: to AdamW a zero is something else.
        there = torch.tensor([float(p.grad is not None) for p in parameters])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # One message; parts of other precisions are sent in the widest.
        flat = torch.cat([there.to(gradients[0].device), *(g.flatten() for g in gradients)])
        with reached():
            distributed.all_reduce(flat)
        there, *sums = flat.split([len(parameters), *(g.numel() for g in gradients)])
        for parameter, gradient, total, known in zip(
            parameters, gradients, sums, there.tolist(), strict=True
        ):
            if known:
                parameter.grad = gradient.copy_(total.view_as(gradient))
