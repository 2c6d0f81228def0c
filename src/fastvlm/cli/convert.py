"""`fastvlm convert`: a checkpoint from one layout to another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastvlm.cli.files import FiguresOutput, check_folder
from fastvlm.cli.loading import Runtime, resolve_model
from fastvlm.functional.errors import InputError


@dataclass(frozen=True, slots=True)
class ConvertRuntime(Runtime):
    """How a checkpoint is read and written; see `Runtime`."""

    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option(help="The precision to store; nothing is computed."),
    ] = "bfloat16"
    quantize: None = None


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
        Literal["fastvlm", "transformers"],
        typer.Option(
            help="fastvlm: around our own encoder, which needs no timm. transformers: timm's,"
            " as in the published checkpoints.",
        ),
    ] = "fastvlm",
    runtime: ConvertRuntime,
    figures: FiguresOutput,
) -> None:
    """Convert a checkpoint of FastVLM to another layout, every parameter kept."""
    if output.exists():
        raise InputError(f"{output} exists already; choose another output.")
    check_folder(output, "the output")
    runtime.prepare()
    import torch

    from fastvlm.checkpoints import load_checkpoint, save_checkpoint

    model, tokenizer = load_checkpoint(
        resolve_model(source) or source, getattr(torch, runtime.dtype), runtime.device
    )
    save_checkpoint(model, tokenizer, output, layout)
    count = sum(parameter.numel() for parameter in model.parameters())
    figures.write(
        {"output": str(output), "parameters": count, "dtype": runtime.dtype, "layout": layout}
    )
    figures.console.print(
        f"{output}: {count:,} parameters in {runtime.dtype}, in the layout {layout}.",
        soft_wrap=True,
    )
