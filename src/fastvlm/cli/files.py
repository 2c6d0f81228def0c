"""Files that the verbs write their figures to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastvlm.functional.errors import InputError


def check_writable(file: Path) -> None:
    """Refuse a file that could not be written after the long work.

    Raises:
        InputError: Its folder is missing or can't be written to, or it is a folder itself.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} to write {file.name} to.")
    if file.is_dir():
        raise InputError(f"{file} is a folder; --json needs the name of a file.")
    if not os.access(folder, os.W_OK):
        raise InputError(f"The folder {folder} can't be written to.")


def write_json(file: Path, figures: dict[str, Any]) -> None:
    """Write beside the file, then rename, so that a kill leaves the old or the new one whole."""
    beside = file.with_name(f"{file.name}.partial")
    beside.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    beside.replace(file)
