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
            " on the Hugging Face hub. Or a text model in a GGUF file.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to be made.")],
    *,
    layout: Annotated[
        Literal["fastvlm", "transformers"] | None,
        typer.Option(
            help="fastvlm: around our own encoder, which needs no timm. transformers: timm's,"
            " as in the published checkpoints; a text model has no other.",
            show_default="fastvlm, or transformers for a text model",
        ),
    ] = None,
    runtime: ConvertRuntime,
    figures: FiguresOutput,
) -> None:
    """Convert a checkpoint of FastVLM to another layout, every parameter kept; or a GGUF file."""
    if output.exists():
        raise InputError(f"{output} exists already; choose another output.")
    check_folder(output, "the output")
    runtime.prepare()
    import torch

    from fastvlm.checkpoints import load_checkpoint, save_checkpoint
    from fastvlm.checkpoints.gguf import GGUF_SUFFIX, convert_gguf

    dtype = getattr(torch, runtime.dtype)
    written: dict[str, object] = {"output": str(output), "dtype": runtime.dtype}
    file = Path(source)
    if file.suffix == GGUF_SUFFIX and file.is_file():
        if layout == "fastvlm":
            raise InputError(f"{file} is a text model, whose layout is transformers' alone.")
        layout = "transformers"
        found = convert_gguf(file, output, dtype)
        count = found.parameters
        written["quantisation"] = [*found.quantisation]
        before = f", quantised before as {', '.join(found.quantisation)}"
    else:
        layout, before = layout or "fastvlm", ""
        model, tokenizer = load_checkpoint(resolve_model(source) or source, dtype, runtime.device)
        save_checkpoint(model, tokenizer, output, layout)
        count = sum(parameter.numel() for parameter in model.parameters())
    figures.write({**written, "parameters": count, "layout": layout})
    figures.console.print(
        f"{output}: {count:,} parameters in {runtime.dtype}, in the layout {layout}{before}.",
        soft_wrap=True,
    )
