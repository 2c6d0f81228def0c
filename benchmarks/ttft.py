"""The time to first token of FastVLM, LLaVA-OneVision, LLaVA-1.5 and ConvNeXt, stage by stage.

The models have their full size and random weights, which time does not depend on: nothing is
downloaded. They are timed in turns; all of them need about 14 GB of memory in float32. A run that
was stopped goes on from what its folder holds.

    python benchmarks/ttft.py --output runs/ttft [--only TEXT] [--rounds N] [--dtype float32]
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch

from fastvlm.cli.terminal import hardware_line, progress
from fastvlm.evaluation.measuring import hardware
from fastvlm.functional.files import locked, write_json, write_text
from ttft_report import markdown, plot
from ttft_stages import chosen, measure_ttft


def main() -> None:
    """Measure, and write ttft.json, ttft.md and ttft.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="measure models with this in their names")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    output: Path = options.output
    names = chosen(options.only)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output), progress("Measuring") as report:
        records = measure_ttft(
            names,
            output,
            rounds=options.rounds,
            dtype=getattr(torch, options.dtype),
            device=options.device,
            progress=report,
        )
    machine = hardware(torch.device(options.device))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"hardware": machine, "date": date, "dtype": options.dtype, "results": records}
    table = markdown(records, f"{hardware_line(machine)}, {options.dtype}")
    write_json(output / "ttft.json", record)
    write_text(output / "ttft.md", table)
    plot(records, output / "ttft.png")
    print(table)  # noqa: T201


if __name__ == "__main__":
    main()
