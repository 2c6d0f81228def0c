"""What the verbs write to a terminal: sentences, replies with colours, and small images."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 24
"""Width of a thumbnail in cells, and most of its height in half cells."""

LINE_SECONDS = 20
"""Time between two lines of progress where standard error is no terminal."""


def print_error(message: str) -> None:
    """Write one sentence to standard error."""
    sentence = " ".join(message.split()) or "Something went wrong."
    typer.echo(f"fastvlm: {sentence}{'' if sentence[-1] in '.!?`' else '.'}", err=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Write what warns a user as one sentence, without the line of code that it came from."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if category is UserWarning:
                print_error(str(message))
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


class ReplyWriter:
    """Writes a reply as it streams, wrapped at words, each token in its own style.

    A word is written when the next one begins, as only then its width is known.

    Args:
        console: Where to.
        indent: Cells to the left of the reply.
    """

    def __init__(self, console: Console, indent: int = 4) -> None:
        self.console, self.indent = console, " " * indent
        self.column, self.width = 0, max(20, min(console.width, 100) - indent)
        self.word = Text()

    def write(self, text: str, style: str = "") -> None:
        """Take a piece of the reply; white space of any kind is one space."""
        for part in re.split(r"(\s+)", text):
            if part.isspace():
                self.flush()
            elif part:
                self.word.append(part, style)

    def flush(self) -> None:
        """Write the word that is held back."""
        if not self.word:
            return
        if not self.column:
            before = self.indent
        elif self.column + 1 + self.word.cell_len > self.width:
            before, self.column = f"\n{self.indent}", 0
        else:
            before, self.column = " ", self.column + 1
        self.console.print(Text(before) + self.word, end="", soft_wrap=True)
        self.column += self.word.cell_len
        self.word = Text()

    def close(self) -> None:
        """End the reply's last line."""
        self.flush()
        self.console.print()


def thumbnail(picture: Image.Image) -> Text:
    """Return a picture as half blocks in colour, two pixels a cell."""
    scale = THUMBNAIL / max(picture.size)
    width = max(1, round(picture.width * scale))
    height = max(2, 2 * round(picture.height * scale / 2))
    pixels = picture.convert("RGB").resize((width, height)).tobytes()
    colours = [Color.from_rgb(*pixels[at : at + 3]) for at in range(0, len(pixels), 3)]
    text = Text()
    for row in range(0, height, 2):
        for column in range(width):
            upper, lower = colours[row * width + column], colours[(row + 1) * width + column]
            text.append("▀", Style(color=upper.name, bgcolor=lower.name))
        if row + 2 < height:
            text.append("\n")
    return text


def in_colour(console: Console) -> bool:
    """Return whether a picture can be shown: a terminal with at least 256 colours."""
    return console.color_system in ("256", "truecolor") and not console.no_color


@contextmanager
def progress(task: str) -> Iterator[Callable[[int, int], None]]:
    """Show on standard error how far some work is, and the time left.

    Yields what the work calls with the steps done and their number. A terminal shows a bar; a file
    gets a line every `LINE_SECONDS`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(task)
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        # The rate over the whole run: single steps differ too much to tell the time left.
        bar.speed_estimate_period = 3600
        number = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(number, completed=done, total=total)


class _Lines:
    """Progress as lines of text."""

    def __init__(self, task: str) -> None:
        self.task, self.started = task, time.monotonic()
        self.written = self.started

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.written > LINE_SECONDS:
            left = int((now - self.started) / done * (total - done))
            sys.stderr.write(f"{self.task} {done}/{total}, {left // 60}:{left % 60:02d} left\n")
            self.written = now


def hardware_line(hardware: dict[str, Any]) -> str:
    """Return what figures were measured on, in a line."""
    threads = hardware["threads"]
    return (
        f"{hardware['accelerator'] or hardware['processor']}, {threads}"
        f" {'thread' if threads == 1 else 'threads'} on {hardware['cores']} cores,"
        f" torch {hardware['torch']}, transformers {hardware['transformers']}"
    )


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """Return a figure as a table shows it; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"
