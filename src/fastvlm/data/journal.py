"""Journals: files of JSON lines from which a stopped run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastvlm.functional.errors import InputError
from fastvlm.functional.files import storage_errors, written_file
from fastvlm.functional.text_files import parse_json


def append_line(file: Path, entry: Any) -> None:
    """Append an entry and flush it to the disk.

    Raises:
        StorageError: The disk is full, or the file can't be written.
    """
    with storage_errors(file), file.open("a", encoding="utf-8", errors="backslashreplace") as out:
        out.write(json.dumps(entry, ensure_ascii=False) + "\n")


def whole_lines(file: Path) -> list[Any]:
    """Return a journal's entries; none if there is no such file.

    An incomplete last line, left by a killed process, is removed from the file.

    Raises:
        InputError: Another line is not JSON.
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
