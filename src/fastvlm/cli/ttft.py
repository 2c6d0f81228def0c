"""`fastvlm benchmark ttft`: the time to first token, stage by stage."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fastvlm.cli.files import FiguresOutput, check_folder
from fastvlm.cli.loading import Runtime, usage
from fastvlm.cli.tables import FigureTable
from fastvlm.cli.terminal import hardware_line
from fastvlm.functional.files import locked, write_json, write_text


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
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, max=100_000, help="Measurements of each model.")
    ] = 5,
    runtime: Runtime,
    figures: FiguresOutput,
) -> None:
    """Time FastVLM, LLaVA-OneVision, LLaVA-1.5 and ConvNeXt to their first token, in turns.

    The models have their full size and random weights, which time does not depend on: nothing is
    downloaded. All of them need about 14 GB of memory in float32.
    """
    check_folder(output)
    import torch

    from fastvlm.evaluation.measuring import hardware
    from fastvlm.evaluation.ttft import chosen, measure_ttft
    from fastvlm.evaluation.ttft_report import markdown, plot, rows

    runtime.prepare()
    with usage():
        names = chosen(only)
    with locked(output), runtime.progress("Measuring") as report:
        records = measure_ttft(
            names,
            output,
            rounds=rounds,
            dtype=getattr(torch, runtime.dtype),
            device=runtime.device,
            progress=report,
        )
    machine = hardware(torch.device(runtime.device))
    record = {
        "hardware": machine,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": runtime.dtype,
        "results": records,
    }
    line = f"{hardware_line(machine)}, {runtime.dtype}"
    write_json(output / "ttft.json", record)
    write_text(output / "ttft.md", markdown(records, line))
    figures.write(record)
    heading, body = rows(records)
    table = FigureTable(heading, texts=("run by",), rows=[list(row) for row in body])
    console = figures.console
    table.print(console)
    console.print(f"\n{line}. Written to {output}.", style="dim")
    plot(records, output / "ttft.png")
