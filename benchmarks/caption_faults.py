"""Kill `fastvlm caption` and its workers at random moments, and compare what comes out of it.

The command runs once undisturbed, unless its output is there already, and once with faults: every
few seconds a worker, or the whole run, is ended with SIGKILL; a run that ended is started again.
Both outputs must be the same, byte for byte.

Run `python benchmarks/caption_faults.py INPUT FOLDER [--kills N] [--every S] [--json FILE] --
--workers 2 --max-new-tokens 24`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN = "from fastvlm.cli import main; main()"
WORKER = b"ray::MapWorker(MapBatches(CaptionWorker))"
NOT_OUTPUT = (".lock", "plan.json")
WHOLE_RUN_SHARE = 0.25
"""The share of faults that end the whole run."""


def parent(process: int) -> int:
    """Return the process that started another; 0 for one that is gone."""
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return 0
    return int(stat.rpartition(b")")[2].split()[1])


def workers_of(run: int) -> Iterator[int]:
    """Yield the processes that hold a model for a run."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        above = int(folder.name)
        if command.startswith(WORKER):
            while above > 1 and above != run:
                above = parent(above)
            if above == run:
                yield int(folder.name)


def output(folder: Path) -> dict[str, bytes]:
    """Return the files of an output by their names."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in NOT_OUTPUT
    }


def start(source: str, folder: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """Start a run."""
    return subprocess.Popen([sys.executable, "-c", RUN, "caption", source, str(folder), *options])


def disturbed(source: str, folder: Path, options: list[str], kills: int, every: float) -> Any:
    """Run to the end in spite of faults; what happened."""
    draws = random.Random(0)
    told = {"workers_killed": 0, "runs_killed": 0, "starts": 0, "parts_done_again": 0}
    known: dict[str, int] = {}
    while True:
        process = start(source, folder, options)
        told["starts"] += 1
        while process.poll() is None:
            time.sleep(draws.uniform(0.5, 1.5) * every)
            done = told["workers_killed"] + told["runs_killed"]
            parts = {file.name: file.stat().st_mtime_ns for file in folder.glob("part-*l*")
                     if file.suffix != ".partial"}  # fmt: skip
            told["parts_done_again"] += sum(known.get(name, at) != at for name, at in parts.items())
            known |= parts
            if process.poll() is not None or done >= kills or not parts:
                continue
            if draws.random() < WHOLE_RUN_SHARE:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                told["runs_killed"] += 1
            elif victims := list(workers_of(process.pid)):
                os.kill(draws.choice(victims), signal.SIGKILL)
                told["workers_killed"] += 1
        if process.returncode != -signal.SIGKILL:
            return told | {"exit_code": process.returncode}


def main() -> None:
    """Run, kill and compare."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("folder", type=Path, help="where `whole` and `killed` go")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two faults")
    parser.add_argument("--json", type=Path)
    given, options = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    whole = given.folder / "whole"
    if not (whole / "failed.jsonl").is_file():
        assert start(given.source, whole, options).wait() == 0
    told = disturbed(given.source, given.folder / "killed", options, given.kills, given.every)
    before, after = output(whole), output(given.folder / "killed")
    images = sum(content.count(b"\n") for name, content in after.items() if name[:5] == "part-")
    told |= {
        "images": images,
        "files": len(after),
        "different": sorted(
            name for name in {*before, *after} if before.get(name) != after.get(name)
        ),
    }
    sys.stdout.write(json.dumps(told, indent=2) + "\n")
    if given.json is not None:
        given.json.write_text(json.dumps(told, indent=2) + "\n")
    sys.exit(bool(told["different"]))


if __name__ == "__main__":
    main()
