"""`fastvlm convert`: a checkpoint from one layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvlm.cli.loading import resolve_model
from fastvlm.functional.errors import InputError

PRECISIONS = ("bfloat16", "float16", "float32")


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A FastVLM in Apple's layout, in transformers' or in ours: a directory, or a name"
            " on the Hugging Face hub.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to be made.")],
    *,
    layout: Annotated[
        str,
        typer.Option(
            metavar="fastvlm|transformers",
            help="fastvlm: around our own encoder, which needs no timm. transformers: timm's,"
            " as in the published checkpoints.",
        ),
    ] = "fastvlm",
    dtype: Annotated[
        str, typer.Option(metavar="|".join(PRECISIONS), help="The precision to store.")
    ] = "bfloat16",
) -> None:
    """Convert a checkpoint of FastVLM to another layout, every parameter kept."""
    if dtype not in PRECISIONS:
        raise InputError(f"The precisions are {', '.join(PRECISIONS)}; got --dtype {dtype}.")
    if output.exists():
        raise InputError(f"{output} exists already; choose another output.")
    import torch
    from transformers.utils import logging

    from fastvlm.checkpoints import LAYOUTS, load_checkpoint, save_checkpoint

    if layout not in LAYOUTS:
        raise InputError(f"The layouts are {', '.join(LAYOUTS)}; got --layout {layout}.")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, tokenizer = load_checkpoint(
        resolve_model(source) or source, getattr(torch, dtype), "cpu"
    )
    save_checkpoint(model, tokenizer, output, layout)
    count = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(f"{output}: {count:,} parameters in {dtype}, in the layout {layout}.")
