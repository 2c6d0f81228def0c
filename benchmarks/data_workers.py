"""What share of a training step waits for data, with workers and without.

The example model is trained for a while on photos of 12 megapixels, as cameras make them:
COCO's, enlarged and saved as JPEG. Each round trains with every number of workers, in an order that
turns; a training starts anew each time, and its first steps, in which workers start, are not
measured. All trainings take the same steps, so their losses must be equal bit for bit.

Run `python benchmarks/data_workers.py --photos DIR [--workers N ...] [--batch N] [--size N]
[--rounds N] [--steps N] [--threads N] [--device NAME] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from transformers.utils import logging

import fastvlm_example
from fastvlm.checkpoints import load_checkpoint
from fastvlm.data.conversations import Conversation, Records
from fastvlm.data.feed import Feed
from fastvlm.data.questions import images_in
from fastvlm.evaluation.measuring import hardware
from fastvlm.functional.statistics import Spread
from fastvlm.training.instruction import InstructionTask
from fastvlm.training.optimisation import seed_step
from fastvlm.training.parts import learning
from fastvlm.training.processes import Processes, compute_on, this_process
from fastvlm.training.rows import rows_for
from fastvlm.training.schedule import Schedule
from fastvlm.training.train_state import TrainState

PIXELS = (4000, 3000)
PHOTOS = 24
UNMEASURED = 2
"""Steps in the beginning of a training: workers start, and then have nothing ready."""
REPLY = "Two people stand beside a small table in a room with a large window behind them."


def enlarged(photos: Sequence[Path], folder: Path) -> list[Path]:
    """Save photos as a camera would, and return where."""
    found = []
    for path in photos:
        with Image.open(path) as image:
            large = image.convert("RGB").resize(PIXELS, Image.Resampling.BICUBIC)
        found.append(folder / path.name)
        large.save(found[-1], quality=90)
    return found


def conversations(paths: Sequence[Path]) -> Records:
    """Return a question and an answer about each photo."""

    def converted(name: str, path: Path) -> Conversation:
        shown = {"type": "image", "image": str(path)}
        asked = {"type": "text", "text": "What is in this picture?"}
        said = {"type": "text", "text": REPLY}
        turns = ({"role": "user", "content": [shown, asked]},)
        return Conversation(name, (*turns, {"role": "assistant", "content": [said]}))

    return Records(paths, converted, lambda _, path: path.name)


@dataclass
class Taken:
    """What the measured steps of trainings took.

    Args:
        waited: The share of each step in which it waited for its examples.
        seconds: How long each step took.
        losses: The last training's, of each of its steps.
    """

    waited: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def train(source: Records, options: argparse.Namespace, workers: int, taken: Taken) -> None:
    """Train for a while, and add what the steps took."""
    model, tokenizer = load_checkpoint(fastvlm_example.MODEL, torch.float32, "cpu")
    model.to(this_process().device)
    rows = rows_for(model, tokenizer, options.size)
    schedule = Schedule(UNMEASURED + options.steps, 1e-5, warmup=0)
    taken.losses = []
    with (
        learning(model, "decoder", 1),
        closing(InstructionTask(model, rows, Feed(source), options.batch, workers=workers)) as task,
    ):
        train_state = TrainState(task, schedule, Accelerator(), Processes())
        for step in range(schedule.steps):
            seed_step(0, step)
            started = time.perf_counter()
            examples = task.draw(step)
            drawn = time.perf_counter()
            losses = train_state.losses(examples)
            losses.total.backward()
            train_state.step(step, losses.weight)
            taken.losses.append(float(losses.total.detach()))
            ended = time.perf_counter()
            if step >= UNMEASURED:
                taken.waited.append((drawn - started) / (ended - started))
                taken.seconds.append(ended - started)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=4, help="conversations in a step")
    parser.add_argument("--size", type=int, default=512, help="side in pixels of the images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    logging.disable_progress_bar()
    compute_on(options.device)
    taken = {workers: Taken() for workers in options.workers}
    with tempfile.TemporaryDirectory() as folder:
        paths = enlarged(images_in(options.photos, PHOTOS), Path(folder))
        source = conversations(paths)
        for number in range(options.rounds):
            turn = number % len(options.workers)
            for workers in options.workers[turn:] + options.workers[:turn]:
                train(source, options, workers, taken[workers])
    first, *others = taken.values()
    if this_process().device.type == "cpu" and any(one.losses != first.losses for one in others):
        raise SystemExit("What is learnt depends on the number of workers.")
    out: dict[str, Any] = {
        "hardware": hardware(this_process().device),
        "settings": {k: v for k, v in vars(options).items() if k not in ("photos", "json")},
        "pixels": PIXELS,
        "workers": {},
    }
    for workers, one in taken.items():
        waited, seconds = Spread.of(one.waited), Spread.of(one.seconds)
        out["workers"][workers] = {
            "waited_share": [waited.median, waited.low, waited.high],
            "step_seconds": [seconds.median, seconds.low, seconds.high],
        }
        print(  # noqa: T201
            f"{workers} workers: a step takes {seconds.median:.2f} s ({seconds.low:.2f}-"
            f"{seconds.high:.2f}), {100 * waited.median:.1f} % of it ({100 * waited.low:.1f}-"
            f"{100 * waited.high:.1f}) waiting for data",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
