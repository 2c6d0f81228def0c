"""`fastvlm benchmark ttft`: the time to first token, stage by stage."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastvlm.cli.loading import DeviceOption, DtypeOption, ThreadsOption
from fastvlm.cli.terminal import hardware_line, progress
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import write_json, write_text


def ttft(
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where measurements are kept while it runs (a stopped run goes on from them), and"
            " in the end ttft.json, ttft.md and ttft.png.",
        ),
    ],
    *,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Measure models with this in their names; give it again for more.",
            show_default="all",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each model.")] = 5,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    threads: ThreadsOption = None,
) -> None:
    """Time FastVLM, LLaVA-OneVision, LLaVA-1.5 and ConvNeXt to their first token, in turns.

    The models have their full size and random weights, which time does not depend on: nothing is
    downloaded. All of them need about 14 GB of memory in float32.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; --output needs a folder.")
    import torch
    from transformers.utils import logging

    from fastvlm.evaluation.measuring import hardware
    from fastvlm.evaluation.ttft import chosen, measure_ttft
    from fastvlm.evaluation.ttft_report import markdown, plot, rows

    logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    names = chosen(only)
    with progress("Measuring") as report:
        records = measure_ttft(
            names,
            output,
            rounds=rounds,
            dtype=getattr(torch, dtype),
            device=device,
            progress=report,
        )
    machine = hardware(torch.device(device))
    figures = {
        "hardware": machine,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": dtype,
        "results": records,
    }
    line = f"{hardware_line(machine)}, {dtype}"
    write_json(output / "ttft.json", figures)
    write_text(output / "ttft.md", markdown(records, line))
    heading, body = rows(records)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in heading:
        table.add_column(name, justify="left" if name in ("model", "run by") else "right")
    for row in body:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\n{line}. Written to {output}.", style="dim")
    plot(records, output / "ttft.png")
