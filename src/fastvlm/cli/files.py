"""Files that the verbs write their figures to."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvlm.cli.terminal import PlainConsole
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import as_json, storage_errors, write_json

STANDARD_OUTPUT = Path("-")


@dataclass(frozen=True, slots=True)
class FiguresOutput:
    """Where a verb's figures go: the option `--json`, which is checked at once.

    Args:
        json: A file; `-` for standard output, which then gets nothing else; None for none.

    Raises:
        InputError: The file could not be written after the long work.
        StorageError: The same, for a reason of the disk's.
    """

    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the figures as JSON (times in milliseconds) to this file; - for standard"
            " output, which then gets nothing else.",
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Check the file."""
        if self.json not in (None, STANDARD_OUTPUT):
            check_writable(self.json)

    @property
    def console(self) -> PlainConsole:
        """What people are shown the figures on; silent if standard output is for the JSON."""
        return PlainConsole(quiet=self.json == STANDARD_OUTPUT)

    def write(self, figures: dict[str, Any]) -> None:
        """Write the figures, if they are wanted.

        Raises:
            StorageError: They can't be written.
        """
        if self.json == STANDARD_OUTPUT:
            sys.stdout.write(as_json(figures))
        elif self.json is not None:
            write_json(self.json, figures)


def check_writable(file: Path) -> None:
    """Refuse a file that could not be written after the long work.

    Raises:
        InputError: Its folder is missing, or it is a folder itself.
        StorageError: Nothing can be written there.
    """
    folder = file.absolute().parent
    if file.is_dir():
        raise InputError(f"{file} is a folder; the name of a file is needed.")
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} to write {file.name} to.")
    with storage_errors(file):
        if file.exists() and not file.is_file():
            file.open("ab").close()  # a device or a pipe
        else:
            with tempfile.TemporaryFile(dir=folder) as tried:
                tried.write(b"{}")


def check_folder(folder: Path, option: str = "--output") -> None:
    """Refuse a folder that could not be written to after the long work; it is not made.

    Args:
        folder: The folder, which need not be there yet.
        option: What it was given as.

    Raises:
        InputError: It, or one that it is to be made in, is a file.
        StorageError: Nothing can be written there.
    """
    with storage_errors(folder):
        place = folder.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise InputError(f"{place} is a file; {option} needs a folder.")
        with tempfile.TemporaryFile(dir=place) as tried:
            tried.write(b"{}")
