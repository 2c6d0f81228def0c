"""Figures as a table, or as a list where a table is too wide: nothing is ever truncated."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

MAX_NAME_CELLS = 28
"""The maximum width of names and other texts, in character cells; longer ones are wrapped."""


SHORTENED_HEADINGS = {"acceptance": "accept.", "transformers": "trans- formers"}
"""Short forms of words in headings, used where the table is too wide otherwise."""
MIN_FIGURE_CELLS = 8
"""The minimum width of a figure in a list, in character cells."""


@dataclass(slots=True)
class FigureTable:
    """Rows of figures, the first cell of each being its name.

    Args:
        headings: The columns' headings.
        texts: Columns of text, aligned to the left like the first one.
    """

    headings: Sequence[str]
    texts: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)
    last: int | None = None

    def add(self, *cells: str) -> None:
        """Add a row; a cell may have several lines."""
        self.rows.append(list(cells))

    def end_section(self) -> None:
        """Separate the rows that follow from those so far."""
        self.last = len(self.rows) - 1

    def print(self, console: Console) -> None:
        """Print the table, or a list for each row if the console is too narrow."""
        for padding, shortened in ((1, {}), (0, SHORTENED_HEADINGS)):
            table = self._table(padding, shortened)
            natural = Measurement.get(console, console.options.update(width=10**6), table)
            if natural.maximum <= console.width:
                console.print(table)
                return
        for place, row in enumerate(self.rows):
            if place:
                console.print()
            self._print_list(console, row)

    def _table(self, padding: int, shortened: Mapping[str, str]) -> Table:
        out = Table(
            box=SIMPLE_HEAD,
            padding=(0, padding, 0, 0),
            collapse_padding=True,
            pad_edge=False,
            show_edge=False,
        )
        names = (self.headings[0], *self.texts)
        for index, heading in enumerate(self.headings):
            cells = [_wrapped(row[index]) for row in self.rows]
            words = " ".join(shortened.get(word, word) for word in heading.split())
            longest = max([cell_len(part) for part in words.split()] + [_width(c) for c in cells])
            lines = textwrap.wrap(words, longest, break_long_words=False, break_on_hyphens=False)
            out.add_column(
                "\n".join(lines), justify="left" if heading in names else "right", no_wrap=True
            )
        for number, row in enumerate(self.rows):
            out.add_row(*(_wrapped(cell) for cell in row), end_section=number == self.last)
        return out

    def _print_list(self, console: Console, row: Sequence[str]) -> None:
        console.print(Text(" ".join(row[0].split()), "bold"))
        widest = max(cell_len(heading) for heading in self.headings[1:])
        for heading, cell in zip(self.headings[1:], row[1:], strict=True):
            told = ", ".join(cell.split("\n")).strip(", ")
            if told:
                first = f"  {heading:<{widest}}  "
                shown = textwrap.fill(
                    told,
                    max(console.width, len(first) + MIN_FIGURE_CELLS),
                    initial_indent=first,
                    subsequent_indent=" " * len(first),
                    break_long_words=False,
                )
                console.print(shown, soft_wrap=True)


def _wrapped(cell: str) -> str:
    """Return a cell's text in lines that are no longer than a name should be."""
    lines = (
        textwrap.wrap(line, MAX_NAME_CELLS, break_long_words=False) for line in cell.split("\n")
    )
    return "\n".join("\n".join(line) for line in lines)


def _width(cell: str) -> int:
    return max(cell_len(line) for line in cell.split("\n"))
