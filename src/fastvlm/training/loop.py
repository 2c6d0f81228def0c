"""The training loop of every stage: seeded, resumable, on one process or several.

What a step draws depends on the run's seed and the step's number alone, or on a stream whose
position is in the checkpoint; so a resumed run continues exactly where it stopped.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from fastvlm.functional.errors import CheckpointError, FastVlmError, InputError, first_line
from fastvlm.functional.files import locked
from fastvlm.training.checkpoint import read_checkpoint, write_checkpoint
from fastvlm.training.optimisation import seed_step
from fastvlm.training.processes import Processes
from fastvlm.training.progress import RunProgress, check_trackers
from fastvlm.training.schedule import Schedule
from fastvlm.training.sharding import ShardedTrainState, is_sharded_run
from fastvlm.training.task import TrainingTask, Validate
from fastvlm.training.train_state import TrainState

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask a run to stop: from a scheduler, from Ctrl-C, from a closed terminal."""


class StoppedError(FastVlmError):
    """The run was asked to stop; its checkpoint is written.

    Args:
        message: The error message.
        signal_number: The signal that this process received; SIGTERM if another process did.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def train(
    task: TrainingTask, schedule: Schedule, output: Path, validate: Validate | None = None
) -> None:
    """Run a task to its last step, resuming from `output/checkpoint.pt` if there is one.

    Progress goes to standard error and, one JSON object a line, to `output/log.jsonl`; the curves
    to `output/curves.png`. Process 0 alone writes, to a disk that all processes share.

    Args:
        task: What to train.
        schedule: Steps, learning rate and so on.
        output: The folder of the checkpoint, the log and the curves.
        validate: Returns validation measures; called by every process.

    Raises:
        StoppedError: SIGTERM, SIGHUP or Ctrl-C arrived at a process; the checkpoint is written.
        LostProcessError: Another process ended.
        CheckpointError: The checkpoint belongs to a run with another plan, or can't be read.
        StorageError: The disk is full; the last checkpoint stays.
        InputError: A step can't be split into as many slices as asked for, a tracker or a precision
            is not available, or another run writes to the output.
    """
    check_trackers(schedule.trackers)
    processes = Processes()
    try:
        accelerator = Accelerator(
            mixed_precision=schedule.precision,
            log_with=list(schedule.trackers) or None,
            project_dir=output / "trackers",
        )
    except ValueError as error:  # a process has one precision, which accelerate keeps
        raise InputError(f"This run can't be set up: {first_line(error)}.") from error
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise InputError(f"A run's precision is no or bf16; got {accelerator.mixed_precision}.")
    schedule = replace(schedule, precision=accelerator.mixed_precision)
    with locked(output) if processes.index == 0 else nullcontext():
        Run(task, schedule, output, accelerator, processes).go(validate)


class Run:
    """A training run.

    Args:
        task: What to train.
        schedule: Steps, learning rate and so on.
        output: The output folder.
        accelerator: Provides mixed precision and trackers.
        processes: The processes that take each step together.

    Raises:
        InputError: The task can't be split among processes or accumulated, but several slices are
            asked for.
    """

    def __init__(
        self,
        task: TrainingTask,
        schedule: Schedule,
        output: Path,
        accelerator: Accelerator,
        processes: Processes,
    ) -> None:
        self.task, self.schedule, self.processes = task, schedule, processes
        self.slices = schedule.accumulation * processes.number
        if self.slices > 1 and task.whole is not None:
            raise InputError(
                f"This is trained by one process without accumulation: {task.whole}; got"
                f" {processes.number} and {schedule.accumulation}."
            )
        self.accelerator = accelerator
        train_state = ShardedTrainState if is_sharded_run() else TrainState
        self.train_state = train_state(task, schedule, accelerator, processes)
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.file = output, output / "checkpoint.pt"
        self.plan = {**schedule.plan(), "task": dict(task.plan)}
        self.saved = time.monotonic()

    def go(self, validate: Validate | None) -> None:
        """Take all remaining steps, with validation along the way."""
        first = self.resume()
        progress = None
        if self.processes.index == 0:
            progress = RunProgress(
                self.schedule, first, self.task.unit, self.output, self.accelerator
            )
        settings = {name: value for name, value in self.schedule.plan().items() if value}
        self.accelerator.init_trackers("fastvlm", config=settings)
        with asked_to_stop() as asked, without_denormals():
            for step in range(first, self.schedule.steps):
                stop, due = self.step(step, progress, asked)
                done = step + 1
                last = done == self.schedule.steps
                if validate is not None and (last or done % self.schedule.validation_steps == 0):
                    self.validate(validate, done, progress)
                if stop or due or last:
                    self.save(done, progress, ended=stop or last)
                if stop and not last:
                    raise StoppedError(
                        f"Stopped after step {done} of {self.schedule.steps}; run the same command"
                        " again to go on from there.",
                        *asked[:1],
                    )
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def step(
        self, step: int, progress: RunProgress | None, asked: Sequence[int]
    ) -> tuple[bool, bool]:
        """Take a step.

        Args:
            step: The step's number, from 0 on.
            progress: Where to report it; None in all processes but the first.
            asked: The signals that have asked this process to stop.

        Returns:
            Whether any process was asked to stop, and whether a checkpoint is due.

        Raises:
            InputError: There is nothing to learn from in the examples.
        """
        seed_step(self.schedule.seed, step)
        weight, sums = 0.0, dict[str, tuple[float, float]]()
        for number, examples in self.mine(self.task.draw(step)):
            seed_step(self.schedule.seed, step, 1 + number)
            losses = self.train_state.losses(examples)
            self.accelerator.backward(losses.total)
            weight += losses.weight
            add(sums, {"loss": (float(losses.total.detach()), losses.weight), **losses.report})
        due = time.monotonic() - self.saved > self.schedule.checkpoint_seconds
        told = self.processes.tell((weight, sums, bool(asked), due))
        weight, report = sum(said[0] for said in told), dict[str, tuple[float, float]]()
        for said in told:
            add(report, said[1])
        if not weight:
            raise InputError(f"There is nothing to learn from in the examples of step {step + 1}.")
        self.train_state.step(step, weight)
        if progress is not None:
            progress.add(step, weight, report)
        # Process 0 has the clock.
        return any(said[2] for said in told), told[0][3]

    @staticmethod
    def validate(validate: Validate, step: int, progress: RunProgress | None) -> None:
        """Validate, and report the results.

        Args:
            validate: Returns measures by name, given the number of steps taken.
            step: The number of steps taken.
            progress: Where to report them; None in all processes but the first.
        """
        if progress is None:
            validate(step)
        else:
            progress.close()
            progress.validated(validate(step))

    def mine(self, examples: Sequence[Any]) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield this process's slices of a step, with their numbers among those of all processes.

        Two processes have the same slices as one with twice the accumulation.

        Raises:
            InputError: There are fewer examples than slices.
        """
        accumulation, streams = self.schedule.accumulation, self.task.source is not None
        slices = accumulation if streams else self.slices
        if len(examples) < slices:
            raise InputError(
                f"A step has {len(examples)} examples, which can't be cut into {slices} slices;"
                " take fewer processes or less accumulation."
            )
        for index in range(accumulation):
            number = self.processes.index * accumulation + index
            cut = index if streams else number
            first, end = len(examples) * cut // slices, len(examples) * (cut + 1) // slices
            yield number, examples[first:end]

    def resume(self) -> int:
        """Restore the last checkpoint, if there is one, and return the step to begin with.

        Raises:
            CheckpointError: The checkpoint is broken, or belongs to another run.
        """
        source, processes = self.task.source, self.processes
        state = read_checkpoint(self.file, self.plan, processes.number, streams=source is not None)
        first = 0 if state is None else state["step"]
        if len(set(processes.tell(first))) > 1:
            raise CheckpointError(
                f"The processes don't see the same {self.file}; the output must lie on a disk that"
                " all of them share."
            )
        if state is not None:
            try:
                self.train_state.load(state)
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(
                    f"{self.file} doesn't fit what is trained: {first_line(error)}."
                ) from error
            if source is not None:
                source.load_state_dict(state["streams"][processes.index])
        return first

    def save(self, step: int, progress: RunProgress | None, *, ended: bool) -> None:
        """Write the checkpoint, and return when all processes have it.

        Args:
            step: The step to resume with.
            progress: Where to write pending log entries; None in all processes but the first.
            ended: Whether the run ends here, so that the curves are drawn in any case.
        """
        source = self.task.source
        streams = self.processes.tell(None if source is None else source.state_dict())
        state = self.train_state.state()
        if progress is not None:
            # What is logged after the checkpoint is forgotten on resuming, and told again.
            progress.close()
            kept = {"plan": self.plan, "step": step, "streams": streams, **state}
            write_checkpoint(self.file, kept)
            progress.draw(ended=ended)
        self.processes.tell(step)
        self.saved = time.monotonic()


def add(sums: dict[str, tuple[float, float]], more: Any) -> None:
    """Add measures, each with its count, to sums by name."""
    for name, (value, number) in more.items():
        before, counted = sums.get(name, (0.0, 0.0))
        sums[name] = (before + value, counted + number)


@contextmanager
def without_denormals() -> Iterator[None]:
    """Flush denormal numbers to zero in this context.

    The gradients of layer scales and of saturated losses are often denormal, which makes a CPU up
    to 2.5x slower.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def asked_to_stop() -> Iterator[Sequence[int]]:
    """Collect the signals that ask a run to stop, instead of stopping at once.

    A second Ctrl-C stops it at once. Signals reach the main thread only.
    """
    asked: list[int] = []

    def ask(signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in asked:
            raise KeyboardInterrupt
        asked.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
