"""Showing a reply as it streams, and its image, in a terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_CELLS = 24
"""Maximum size of a thumbnail: its width in cells, and its height in half cells."""


class ReplyWriter:
    """Writes a reply as it streams, wrapped at words, each token in its own style.

    A word is written when the next one begins, as its width is only known then.

    Args:
        console: Where to write.
        indent: The left margin, in character cells.
    """

    def __init__(self, console: Console, indent: int = 4) -> None:
        self.console, self.indent = console, " " * indent
        self.column, self.width = 0, max(20, min(console.width, 100) - indent)
        self.word = Text()

    def write(self, text: str, style: str = "") -> None:
        """Add a piece of the reply; any white space becomes a single space."""
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


def thumbnail(image: Image.Image) -> Text:
    """Return an image as coloured half blocks, two pixels to a character cell."""
    scale = THUMBNAIL_CELLS / max(image.size)
    width = max(1, round(image.width * scale))
    height = max(2, 2 * round(image.height * scale / 2))
    pixels = image.convert("RGB").resize((width, height)).tobytes()
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
    """Return whether a terminal can show images: with 256 colours and half blocks."""
    coloured = console.color_system in ("256", "truecolor") and not console.no_color
    return coloured and not console.options.ascii_only
