"""Journals: files of JSON lines that a stopped run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastvlm.functional.errors import InputError


def append_line(file: Path, entry: Any) -> None:
    """Add an entry, which is in the file when this returns."""
    with file.open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(entry, ensure_ascii=False) + "\n")


def whole_lines(file: Path) -> list[Any]:
    """Return a journal's entries, none where there is no such file.

    A last line that a kill has cut off is dropped, from the file too.

    Raises:
        InputError: Another line is no JSON.
    """
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        beside = file.with_name(f"{file.name}.partial")
        beside.write_bytes(whole)
        beside.replace(file)
    entries = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"Line {number} of {file} is not valid JSON: {error}.") from error
    return entries
