"""The words of the field, and only those: what was called otherwise once is not called so again."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file for folder in ("src", "packages", "recipes") for file in (ROOT / folder).rglob("*.py")
)
FORMER = frozenset(
    [
        "Decoding",
        "Selection",
        "Drawn",
        "TokenByToken",
        "Guess",
        "Drafters",
        "Drafter",
        "Pace",
        "GRANT",
        "EVEN",
        "CLOSE",
        "Span",
        "Projection",
        "PrefixStore",
        "Kept",
        "Beginning",
        "remember",
        "Prompts",
        "with_places",
        "FeatureMemory",
        "Learner",
        "Forcing",
        "Taught",
        "Passed",
        "answered",
        "in_turn",
        "complain",
        "located",
        "among",
        "LARGE",
        "PASS",
        "WIDE",
        "PATIENCE",
        "seat",
        "write_at",
        "captured",
        "completed",
        "likeliest",
        "goes_on",
        "earn",
    ]
)
WORDS = re.compile(r"picture|photograph|(?<![a-z])views?(?![a-z])|lesson", re.IGNORECASE)
"""In no name; `view` is a tensor's own method."""
ALLOWED = frozenset({"view", "view_as"})
MAX_LINES = 400


def names(file: Path) -> Iterator[tuple[int, str]]:
    """Yield each name that a file defines, with its line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_names_are_the_fields(file: Path) -> None:
    found = [
        f"{file}:{line} {name}"
        for line, name in names(file)
        if name in FORMER or (WORDS.search(name) and name not in ALLOWED)
    ]
    assert not found


def test_no_source_file_is_long() -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCES}
    assert not {file: length for file, length in lengths.items() if length > MAX_LINES}
