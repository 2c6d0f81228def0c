"""Output to a terminal: sentences, figures, progress."""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from fastvlm.cli.streams import printable

PROGRESS_LINE_SECONDS = 20
"""Seconds between two lines of progress where standard error is not a terminal."""
MIN_CONSOLE_CELLS = 20
"""The minimum console width, even if `COLUMNS` is smaller."""
UNLIMITED_CELLS = 100_000
"""The width of output to a file or a pipe, where no line is wrapped."""


class PlainConsole(Console):
    """A console that shows text without markup, and raises `BrokenPipeError` if its reader is gone.

    Args:
        stderr: Whether it writes to standard error.
        quiet: Whether it writes nothing.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        # A file's name may look like markup or an emoji.
        super().__init__(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)
        if not os.environ.get("COLUMNS", "").isdecimal():
            if not self.is_terminal:
                self.width = UNLIMITED_CELLS
            elif self.is_dumb_terminal:
                # It has a width all the same.
                self.width, self.height = shutil.get_terminal_size()
        self.width = max(self.width, MIN_CONSOLE_CELLS)

    def on_broken_pipe(self) -> None:
        """Raise the error, on which rich would exit; ignore it for progress on standard error."""
        if self.stderr:
            self.quiet = True
            return
        raise  # noqa: PLE0704 (rich calls this while it handles a BrokenPipeError)


def print_error(message: str) -> None:
    """Write one sentence to standard error."""
    sentence = printable(" ".join(message.split())) or "Something went wrong."
    print_aside(f"fastvlm: {sentence}{'' if sentence[-1] in '.!?`' else '.'}")


def print_aside(text: str) -> None:
    """Write lines to standard error.

    Unlike `typer.echo`, it respects the encoding of standard error.
    """
    # Where standard error can't be written, there is nowhere to say so.
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Write warnings as one sentence, without the line of code that raised them."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if category is UserWarning:
                print_error(str(message))
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


def hush(quiet: bool) -> bool:
    """Ignore all further warnings, if asked to; the callback of `--quiet`."""
    if quiet:
        warnings.simplefilter("ignore")
    return quiet


@contextmanager
def progress(
    task: str, *, quiet: bool = False, unit: str | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of some work on standard error, with the time left.

    Yields a function to call with the steps done and the total. A terminal shows a bar; a file
    gets a line every `PROGRESS_LINE_SECONDS`.

    Args:
        task: What is being done, in one word.
        quiet: Whether to show nothing.
        unit: What the steps are, such as "images", whose rate is shown too; None for no rate.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = PlainConsole(stderr=True)
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(task, quiet, unit)
        return
    rate = () if unit is None else ("{task.fields[rate]}",)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), *rate,
               TimeRemainingColumn())  # fmt: skip
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True) as bar:
        # The rate over the whole run: single steps differ too much to tell the time left.
        bar.speed_estimate_period = 3600
        number = bar.add_task(task, total=None, rate="")

        def show(done: int, total: int) -> None:
            said = rate_of(done, time.monotonic() - started, unit)
            bar.update(number, completed=done, total=total, rate=said)

        yield show


def rate_of(done: int, seconds: float, unit: str | None) -> str:
    """Return a rate in words; "" without a unit."""
    return "" if unit is None else f"{done / max(seconds, 1e-9):.1f} {unit}/s"


class _Lines:
    """Progress as lines of text."""

    def __init__(self, task: str, quiet: bool, unit: str | None) -> None:
        self.task, self.quiet, self.unit, self.started = task, quiet, unit, time.monotonic()
        self.written = self.started

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.quiet or not done or now - self.written <= PROGRESS_LINE_SECONDS:
            return
        left = int((now - self.started) / done * (total - done))
        rate = rate_of(done, now - self.started, self.unit)
        rate = f", {rate}" if rate else ""
        print_aside(f"{self.task} {done}/{total}{rate}, {left // 60}:{left % 60:02d} left")
        self.written = now


def hardware_line(hardware: dict[str, Any]) -> str:
    """Return the hardware that figures were measured on, as one line."""
    threads = hardware["threads"]
    onnx = f", ONNX Runtime {hardware['onnxruntime']}" if "onnxruntime" in hardware else ""
    return (
        f"{hardware['accelerator'] or hardware['processor']}, {threads}"
        f" {'thread' if threads == 1 else 'threads'} on {hardware['cores']} cores,"
        f" torch {hardware['torch']}, transformers {hardware['transformers']}{onnx}"
    )


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """Return a number as a table shows it, or a dash for None.

    Args:
        value: The number.
        digits: Digits after the decimal point.
        unit: Appended to the number, such as "x".
    """
    return "-" if value is None else f"{value:.{digits}f}{unit}"
