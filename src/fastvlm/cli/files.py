"""Files that the verbs write their figures to."""

from __future__ import annotations

import os
from pathlib import Path

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
