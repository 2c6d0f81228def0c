"""A model as the verbs want it: quietly, without a network where none is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    import torch

    from fastvlm.vlm import VisionLanguageModel

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
SkippedLayersOption = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="For skip: the layers that do not draft, separated by commas and counted from 0.",
        show_default="every second one of the middle half; benchmark searches for them",
    ),
]


def layers_in(listed: str | None) -> tuple[int, ...] | None:
    """Return the layers of a list as it is typed: `3,5,7`.

    Raises:
        InputError: There is something else than whole numbers in it.
    """
    if listed is None:
        return None
    try:
        return tuple(int(number) for number in listed.split(",") if number.strip())
    except ValueError:
        raise InputError(
            f"Layers to skip are whole numbers separated by commas, as in 3,5,7; got {listed!r}."
        ) from None


def located(model: str | None) -> str | Path | None:
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
) -> VisionLanguageModel:
    """Load a model, and a draft made for it, without progress bars and warnings of others.

    Raises:
        CheckpointError: The model or the draft is missing, broken or made for something else.
        InputError: The model's family is not known.
    """
    if isinstance(model, str):
        model = located(model)
    if not isinstance(model, str):
        # Files that lie here are read without asking the hub for newer ones.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    from fastvlm.vlm import load

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    # A verb asks once about each picture, or measures what a picture costs.
    return load(model, draft, dtype=getattr(torch, dtype), device=device, prefix_bytes=0)
