"""`fastvlm export`: a model's parts for other runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastvlm.cli.command import add_verb, verbs
from fastvlm.cli.files import FiguresOutput, check_writable
from fastvlm.cli.loading import ModelOption, Runtime
from fastvlm.example import example


@dataclass(frozen=True, slots=True)
class ExportRuntime(Runtime):
    """How a verb computes that writes what it computed with; see `Runtime`."""

    dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="The precision of the file's weights, and of the comparison."),
    ] = "float32"
    quantize: None = None


def onnx(
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The file to be written.")],
    *,
    model: ModelOption = None,
    runtime: ExportRuntime,
    figures: FiguresOutput,
) -> None:
    """Write encoder and projector as ONNX, of any image size in steps of 64 pixels.

    What is written has been run in ONNX Runtime and compared at several sizes.
    """
    check_writable(output)
    vlm = runtime.load(example().MODEL if model is None else model)
    from fastvlm.export import export_onnx

    worst = export_onnx(vlm, output)
    size = output.stat().st_size
    figures.write(
        {"file": str(output), "dtype": runtime.dtype, "bytes": size, "largest_difference": worst}
    )
    figures.console.print(
        f"{output}: {size / 1e6:.0f} MB; ONNX Runtime's features differ by at most {worst:.0e} of"
        " their standard deviation.",
        soft_wrap=True,
    )


app = verbs("Write a model's parts for other runtimes.")
add_verb(app, onnx)


@app.callback()
def export() -> None:
    """Write a model's parts for other runtimes."""
