"""A run's progress: a line on standard error, `log.jsonl`, trackers and curves."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from fastvlm.data.journal import append_line
from fastvlm.functional.errors import InputError, StorageError
from fastvlm.functional.files import write_text
from fastvlm.training.curves import draw_curves, read_log
from fastvlm.training.schedule import Schedule

Sums = Mapping[str, tuple[float, float]]
"""Sums and counts of measures, by name."""

TRACKER_NAMES = ("tensorboard", "wandb", "trackio")

DRAWING_TIME_SHARE = 0.02
"""The maximum share of a run's time for drawing its curves."""


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker that accelerate would silently ignore.

    Raises:
        InputError: It is unknown, or its package is not installed.
    """
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in TRACKER_NAMES:
            raise InputError(f"The trackers are {', '.join(TRACKER_NAMES)}; got {name}.")
        if name not in available:
            raise InputError(f"The tracker {name} is not installed: pip install {name}.")


class RunProgress:
    """Averages what steps report, and regularly writes the means with the time left.

    Args:
        schedule: The run's schedule.
        first: The first step; log entries of later ones are removed.
        unit: The unit of a step's weight.
        output: The folder of `log.jsonl` and `curves.png`.
        accelerator: Has the trackers.
    """

    def __init__(
        self, schedule: Schedule, first: int, unit: str, output: Path, accelerator: Accelerator
    ) -> None:
        self.schedule, self.first, self.unit = schedule, first, unit
        self.log, self.image = output / "log.jsonl", output / "curves.png"
        self.accelerator = accelerator
        self.started = self.written = time.monotonic()
        self.sums: dict[str, tuple[float, float]] = {}
        self.weight = 0.0
        self.step = first
        self.drawn, self.drawing = -math.inf, 0.0
        keep_until(self.log, first)

    def add(self, step: int, weight: float, report: Sums) -> None:
        """Add one step's measures, and write a line when it is time for one.

        Args:
            step: The step's number, from 0 on.
            weight: The step's weight, in the run's unit.
            report: The step's measures.
        """
        self.step = step + 1
        self.weight += weight
        for name, (value, number) in report.items():
            before, counted = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before + value, counted + number)
        if time.monotonic() - self.written > self.schedule.log_seconds:
            self.close()

    def close(self) -> None:
        """Write the averages since the last line."""
        if not self.sums:
            return
        now = time.monotonic()
        means = {name: value / number for name, (value, number) in self.sums.items() if number}
        per_step = (now - self.started) / (self.step - self.first)
        left = int(per_step * (self.schedule.steps - self.step))
        rate = self.weight / (now - self.written)
        self.say(
            f"{shown(means)}  {rate:,.0f} {self.unit}/s  {left // 60}:{left % 60:02d} left",
            {**means, f"{self.unit}/s": rate},
        )
        self.sums, self.weight, self.written = {}, 0.0, now

    def validated(self, measures: Mapping[str, float]) -> None:
        """Write the results of a validation, after a call of `close`."""
        self.say(shown(measures), measures)
        self.written = time.monotonic()

    def say(self, line: str, measures: Mapping[str, float]) -> None:
        """Write a line to standard error, and the measures to the log and the trackers."""
        print(  # noqa: T201
            f"step {self.step}/{self.schedule.steps}  {line}", file=sys.stderr, flush=True
        )
        # The folder may have been removed meanwhile.
        self.log.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.log, {"step": self.step, **measures})
        self.accelerator.log(dict(measures), step=self.step)

    def draw(self, *, ended: bool) -> None:
        """Draw the log's curves, if the run has ended or has time for it.

        If they can't be drawn, the reason is printed when the run ends.
        """
        started = time.monotonic()
        if not ended and (started - self.drawn) * DRAWING_TIME_SHARE < self.drawing:
            return
        try:
            draw_curves(self.log, self.image)
        except (InputError, StorageError) as error:
            # An image is no reason to end a run.
            if ended:
                print(error, file=sys.stderr, flush=True)  # noqa: T201
        self.drawn = time.monotonic()
        self.drawing = self.drawn - started


def shown(measures: Mapping[str, float]) -> str:
    """Return measures as one line of text."""
    return "  ".join(f"{name} {value:.4g}" for name, value in measures.items())


def keep_until(log: Path, step: int) -> None:
    """Remove a log's entries after a step, and any line that was cut short."""
    if not log.is_file():
        return
    kept = [entry for entry in read_log(log) if entry["step"] <= step]
    write_text(log, "".join(json.dumps(entry) + "\n" for entry in kept))
