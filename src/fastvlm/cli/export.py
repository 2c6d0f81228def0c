"""`fastvlm export`: a model's parts for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastvlm.cli.files import check_writable
from fastvlm.cli.loading import DeviceOption, ModelOption, load_quietly
from fastvlm.embedded import MODEL

app = typer.Typer(no_args_is_help=True, help="Write a model's parts for other runtimes.")


@app.callback()
def export() -> None:
    """Write a model's parts for other runtimes."""


@app.command()
def onnx(
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The file to be written.")],
    *,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="The precision of the file's weights.")
    ] = "float32",
) -> None:
    """Write encoder and projector as ONNX, of any image size in steps of 64 pixels.

    What is written has been run in ONNX Runtime and compared at several sizes.
    """
    check_writable(output)
    vlm = load_quietly(MODEL if model is None else model, dtype=dtype, device=device)
    from fastvlm.export import export_onnx

    worst = export_onnx(vlm, output)
    typer.echo(
        f"{output}: {output.stat().st_size / 1e6:.0f} MB; ONNX Runtime's features differ by at most"
        f" {worst:.0e} of their standard deviation."
    )
