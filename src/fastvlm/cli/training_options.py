"""What the verbs of `fastvlm train` have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastvlm.cli.loading import checked_device
from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    from fastvlm.data.conversations import Records, Shards

PhotographsOption = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="Captioned photographs in Flickr8k's layout: captions.tsv, train.txt and images/.",
    ),
]
OutputOption = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Where the checkpoint is kept while it runs, and the result in the end."
    ),
]
StepsOption = Annotated[int, typer.Option(min=1, help="Optimiser steps in all.")]
RateOption = Annotated[
    float,
    typer.Option(
        min=1e-8, max=1, help="The peak of the learning rate: warm-up to it, then a cosine down."
    ),
]
TrainingDeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where to compute, such as cpu, cuda or cuda:1.",
        show_default="what accelerate chooses",
        callback=checked_device,
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Decides every draw of the run.")]


PrecisionOption = Annotated[
    Literal["no", "bf16"] | None,
    typer.Option(help="Mixed precision.", show_default="what accelerate is set to"),
]
AccumulationOption = Annotated[
    int,
    typer.Option(
        min=1, max=4096, help="Slices in which a step is computed: more of them need less memory."
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
        raise InputError(f"{source} is for models around FastViTHD, whose picture size is known.")
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


def check_output(output: Path) -> None:
    """Refuse an output that can't be a folder.

    Raises:
        InputError: It is a file.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; --output needs a folder.")


def prepare_torch(threads: int | None, device: str | None) -> None:
    """Set the number of threads and the device, and keep `transformers` quiet.

    Raises:
        InputError: The run is on another device already.
    """
    import torch
    from transformers.utils import logging

    from fastvlm.training.processes import compute_on

    compute_on(device)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
