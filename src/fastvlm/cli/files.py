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
    """The option `--json`: where a command writes its figures. It is checked at once.

    Args:
        json: A file; `-` for standard output, which then gets nothing else; None for none.

    Raises:
        InputError: The file's folder is missing, or the file is a folder.
        StorageError: The file can't be written.
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
        """The console for people, which is silent if standard output is used for the JSON."""
        return PlainConsole(quiet=self.json == STANDARD_OUTPUT)

    def write(self, figures: dict[str, Any]) -> None:
        """Write the figures, if asked for.

        Raises:
            StorageError: They can't be written.
        """
        if self.json == STANDARD_OUTPUT:
            sys.stdout.write(as_json(figures))
        elif self.json is not None:
            write_json(self.json, figures)


def check_writable(file: Path) -> None:
    """Refuse a file that can't be written, before the work whose results it is for.

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
    """Refuse a folder that can't be written to, before the work whose results it is for.

    Args:
        folder: The folder, which need not exist yet, and is not made here.
        option: The name of its option, for the error message.

    Raises:
        InputError: It, or a folder above it, is a file.
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
