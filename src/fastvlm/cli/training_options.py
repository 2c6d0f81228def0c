"""What the verbs of `fastvlm train` have in common."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from fastvlm.cli.loading import QuietOption, ThreadsOption, checked_device, prepare_torch
from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    from fastvlm.data.conversations import Records, Shards

OutputOption = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Where the checkpoint is kept while it runs, and the result in the end."
    ),
]
CheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Compute layers again on the way back: less memory, more time.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=64,
        help="Processes that open and prepare images ahead of the steps; 0 for none. What is learnt"
        " is the same.",
        show_default="one less than cores, at most 4",
    ),
]
TrackerOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="tensorboard|wandb|trackio",
        help="Where the figures go, besides the log; give it again for several.",
    ),
]


@dataclass(frozen=True, slots=True)
class TrainingRuntime:
    """How a run computes: options that all verbs of `fastvlm train` have.

    Args:
        device: Where; None for what accelerate chooses.
        dtype: In what precision; None for what accelerate is set to.
        threads: Of the CPU; None for torch's own number.
        quiet: Whether only results and errors are shown.
    """

    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Where to compute, such as cpu, cuda or cuda:1.",
            show_default="what accelerate chooses",
            callback=checked_device,
        ),
    ] = None
    dtype: Annotated[
        Literal["float64", "float32", "float16", "bfloat16"] | None,
        typer.Option(
            help="The precision of the model that isn't trained, and to compute in. What learns is"
            " kept in float32, with its gradients and the optimiser.",
            show_default="float32, and what accelerate is set to",
        ),
    ] = None
    threads: ThreadsOption = None
    quiet: QuietOption = False

    @property
    def target_dtype(self) -> str:
        """The precision of a model that isn't trained."""
        return self.dtype or "float32"

    @property
    def mixed_precision(self) -> str | None:
        """The precision by accelerate's name; None for what it is set to."""
        return None if self.dtype is None else {"bfloat16": "bf16"}.get(self.dtype, "no")

    def prepare(self) -> None:
        """Set the number of threads and the device, and keep `transformers` quiet.

        Raises:
            InputError: The run is on another device already.
        """
        from fastvlm.training.processes import compute_on

        compute_on(self.device)
        prepare_torch(self.threads)

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Let a run say how far it is on standard error, if that is wanted."""
        if not self.quiet:
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as null, redirect_stderr(null):  # noqa: PTH123
            yield


@dataclass(frozen=True, slots=True)
class ModelTrainingRuntime(TrainingRuntime):
    """How a run computes that trains a whole model; see `TrainingRuntime`."""

    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            help="The precision to compute in. Weights are kept in float32 all the same, with their"
            " gradients and the optimiser.",
            show_default="what accelerate is set to",
        ),
    ] = None


def conversations_in(source: str, image_size: int | None) -> Records | Shards:
    """Return the conversations of a data set, or of `scenes:N`.

    Args:
        source: The data set.
        image_size: Side in pixels of rendered scenes; None for a model that shows none.

    Raises:
        InputError: There is no such data set, or the model shows no scenes.
    """
    from fastvlm.data.questions import scene_conversations
    from fastvlm.data.reading import read_conversations

    name, _, number = source.partition(":")
    if name != "scenes" or not number.isdecimal():
        return read_conversations(source)
    if image_size is None:
        raise InputError(f"{source} is for models around FastViTHD, whose image size is known.")
    return scene_conversations(range(int(number)), image_size)


def workers_of(given: int | None) -> int:
    """Return the number of workers that prepare data for this process."""
    from fastvlm.data.workers import usual_workers
    from fastvlm.training.processes import this_process

    if given is not None:
        return given
    # What torchrun and accelerate tell; the processes of other machines have cores of their own.
    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or this_process().num_processes)
    return usual_workers(beside)


T = TypeVar("T")


def held_apart(found: list[T], held_out: int, seed: int, what: str) -> tuple[list[T], list[T]]:
    """Return the examples that are held out, drawn at random, and those that are learnt.

    Args:
        found: All of them.
        held_out: How many are held out.
        seed: Decides which.
        what: What they are, in the plural.

    Raises:
        InputError: None is left to learn.
    """
    if len(found) <= held_out:
        raise InputError(
            f"There are {len(found)} {what}, and {held_out} are held out: none is left to learn"
            " from. Give more --data, or a smaller --held-out."
        )
    random.Random(seed).shuffle(found)
    return found[:held_out], found[held_out:]
