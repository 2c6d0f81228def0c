"""The parts of a report, written as Markdown or as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PAGE_CSS = """\
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dde5; }
h3 { font-size: 1rem; margin-top: 1.6rem; }
p { max-width: 46rem; }
.wide { overflow-x: auto; margin: 0 0 1.1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { white-space: normal; max-width: 9rem;
  border-bottom: 2px solid #8a94a6; vertical-align: bottom; }
tbody tr:nth-child(even) { background: #f4f6f9; }
figure { margin: 1.4rem 0; }
figure img { max-width: 100%; }
figcaption { color: #56606f; font-size: .87rem; max-width: 46rem; }
.example { display: flex; gap: 1rem; margin: 1rem 0; align-items: flex-start; }
.example img { width: 220px; border-radius: 4px; flex: none; }
.example dt { color: #56606f; font-size: .8rem; }
.example dd { margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .example { flex-direction: column; } }
"""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of a level, 2 for a section."""

    text: str
    level: int = 2

    def markdown(self) -> str:
        """Return it as Markdown."""
        return f"{'#' * self.level} {self.text}"

    def html(self) -> str:
        """Return it as HTML."""
        return f"<h{self.level}>{escape(self.text)}</h{self.level}>"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph."""

    text: str

    def markdown(self) -> str:
        """Return it as Markdown."""
        return self.text

    def html(self) -> str:
        """Return it as HTML."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True, slots=True)
class Table:
    """A table; all columns but the first hold numbers."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [
            f"| {' | '.join(map(cell, self.heading))} |",
            f"|---|{'---:|' * (len(self.heading) - 1)}",
            *(f"| {' | '.join(map(cell, row))} |" for row in self.rows),
        ]
        return "\n".join(lines)

    def html(self) -> str:
        """Return it as HTML."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.heading)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row)}</tr>\n"
            for row in self.rows
        )
        return (
            f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}</tbody></table></div>"
        )


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot as SVG, which the Markdown expects in `figures/NAME.svg`."""

    name: str
    title: str
    svg: str
    caption: str

    def markdown(self) -> str:
        """Return it as Markdown."""
        return f"![{self.title}](figures/{self.name}.svg)\n\n{self.caption}"

    def html(self) -> str:
        """Return it as HTML."""
        data = embedded(self.svg.encode(), "image/svg+xml")
        alt = escape(self.title, quote=True)
        caption = f"<figcaption>{escape(self.caption)}</figcaption>"
        return f'<figure><img src="{data}" alt="{alt}">{caption}</figure>'


@dataclass(frozen=True, slots=True)
class ExampleBox:
    """A question about an image (JPEG), and replies with the names of those who gave them."""

    image: bytes
    question: str
    replies: Sequence[tuple[str, str]]

    def markdown(self) -> str:
        """Return it as Markdown, without the image."""
        lines = [("asked", self.question), *self.replies]
        return "\n".join(f"- {label}: {' '.join(text.split())}" for label, text in lines)

    def html(self) -> str:
        """Return it as HTML."""
        said = "".join(
            f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>"
            for label, text in [("asked", self.question), *self.replies]
        )
        data = embedded(self.image, "image/jpeg")
        return f'<div class="example"><img src="{data}" alt=""><dl>{said}</dl></div>'


Part = Heading | Paragraph | Table | Plot | ExampleBox


def cell(text: str) -> str:
    """Return text escaped for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def embedded(content: bytes, kind: str) -> str:
    """Return a file as a `data:` URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def markdown(title: str, parts: Sequence[Part]) -> str:
    """Return a report as Markdown."""
    return "\n\n".join([f"# {title}", *(part.markdown() for part in parts)]) + "\n"


def html(title: str, parts: Sequence[Part]) -> str:
    """Return a report as one HTML page."""
    body = "\n".join(part.html() for part in parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{PAGE_CSS}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
