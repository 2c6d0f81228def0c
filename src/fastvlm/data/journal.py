"""Journals: files of JSON lines that a stopped run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastvlm.functional.errors import InputError
from fastvlm.functional.files import storage_errors, written_file
from fastvlm.functional.text_files import parse_json


def append_line(file: Path, entry: Any) -> None:
    """Add an entry, which is in the file when this returns.

    Raises:
        StorageError: The disk is full, or the file can't be written.
    """
    with storage_errors(file), file.open("a", encoding="utf-8", errors="backslashreplace") as out:
        out.write(json.dumps(entry, ensure_ascii=False) + "\n")


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
        with written_file(file) as beside:
            beside.write_bytes(whole)
    entries = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            entries.append(parse_json(line))
        except ValueError as error:
            raise InputError(f"Line {number} of {file} is not valid JSON: {error}.") from error
    return entries
