"""A model as the verbs want it: quietly, without a network where none is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    import torch

    from fastvlm.vlm import VisionLanguageModel


class UsageError(InputError):
    """A command line that makes no sense, whatever model and images it is about."""


@contextmanager
def usage() -> Iterator[None]:
    """Turn what is refused meanwhile into an error of usage.

    Raises:
        UsageError: Something was.
    """
    try:
        yield
    except InputError as error:
        raise UsageError(str(error)) from error


def checked_device(name: str | None) -> str | None:
    """Return a device's name.

    Raises:
        UsageError: There is no such device here.
    """
    if name in (None, "cpu"):
        return name
    import torch

    from fastvlm.functional.errors import first_line

    try:
        device = torch.device(name)
        if device.type == "meta":
            raise UsageError("--device meta computes nothing.")
        torch.zeros(1, device=device)
    # Each backend has its own way of saying that it isn't there.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(f"There is no device {name!r} here: {first_line(error)}.") from error
    return name


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR",
        help="The model: a directory in transformers' layout, or a name on the Hugging Face hub.",
        show_default="the one that ships with fastvlm",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="CPU threads to compute with.", show_default="torch's own"),
]
DtypeOption = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"],
    typer.Option(help="The precision to compute in."),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Where to compute, such as cpu, cuda or cuda:1.",
        callback=checked_device,
    ),
]
SkippedLayersOption = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="For layer-skip: the layers that do not draft, separated by commas, from 0 on.",
        show_default="every second one of the middle half; benchmark searches for them",
    ),
]


def layers_in(listed: str | None) -> tuple[int, ...] | None:
    """Return the layers of a list as it is typed: `3,5,7`.

    Raises:
        UsageError: There is something else than whole numbers in it.
    """
    if listed is None:
        return None
    try:
        return tuple(int(number) for number in listed.split(",") if number.strip())
    except ValueError:
        raise UsageError(
            f"Layers to skip are whole numbers separated by commas, as in 3,5,7; got {listed!r}."
        ) from None


def resolve_model(model: str | None) -> str | Path | None:
    """Return where a model is: a path, a name on the hub, or None for the one that ships.

    `owner/name` may be either. It is a path if it exists, or if `owner` is a folder here: then it
    is a path typed wrong, which no hub need be asked for.
    """
    if model is None:
        return None
    path = Path(model)
    return path if path.exists() or path.parent.is_dir() else model


def load_quietly(
    model: str | Path | None,
    draft: Path | None = None,
    threads: int | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    max_slots: int | None = None,
) -> VisionLanguageModel:
    """Load a model, and a draft made for it, without progress bars and warnings of others.

    Raises:
        CheckpointError: The model or the draft is missing, broken or made for something else.
        InputError: The model's family is not known.
    """
    if isinstance(model, str):
        model = resolve_model(model)
    if not isinstance(model, str):
        # Files that lie here are read without asking the hub for newer ones.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    from fastvlm.decoding.engine import MAX_SLOTS
    from fastvlm.vlm import load

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    return load(
        model,
        draft,
        dtype=getattr(torch, dtype),
        device=device,
        # A verb asks once about each image, or measures what an image costs.
        prefix_bytes=0,
        max_slots=MAX_SLOTS if max_slots is None else max_slots,
    )
