"""Reading text and JSON from users' files, with clear errors."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fastvlm.functional.errors import InputError, first_line

Given = ParamSpec("Given")
Read = TypeVar("Read")


def reads(what: str) -> Callable[[Callable[Given, Read]], Callable[Given, Read]]:
    """Make a reader raise an `InputError` when its files lack a field or have another structure.

    Args:
        what: The files, for the error message, such as "COCO's files".
    """

    def decorate(reader: Callable[Given, Read]) -> Callable[Given, Read]:
        @functools.wraps(reader)
        def read(*args: Given.args, **kwargs: Given.kwargs) -> Read:
            try:
                return reader(*args, **kwargs)
            except KeyError as error:
                raise InputError(
                    f"{what} are not laid out as published: there is no {error}."
                ) from error
            except (AttributeError, IndexError, TypeError, ValueError, OverflowError) as error:
                raise InputError(
                    f"{what} are not laid out as published: {first_line(error)}."
                ) from error

        return read

    return decorate


def read_text(file: Path) -> str:
    """Return a file's text, in UTF-8; a file that ends in `.gz` is unpacked.

    Raises:
        InputError: It can't be read, or is not text in UTF-8.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:
            return content.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not a text in UTF-8 at byte {error.start:,}.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} can't be read: {first_line(error)}.") from error


def parse_json(text: str | bytes) -> Any:
    """Return the contents of a JSON text.

    Raises:
        ValueError: It is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(file: Path) -> Any:
    """Return the contents of a JSON file; a file that ends in `.gz` is unpacked.

    Raises:
        InputError: It can't be read, or is not JSON.
    """
    text = read_text(file)
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{file} can't be read as JSON: {first_line(error)}.") from error


def read_json_lines(file: Path) -> list[Any]:
    """Return the contents of each line of a file of JSON lines; empty lines are skipped.

    Raises:
        InputError: It can't be read, or a line is not JSON.
    """
    lines = []
    # Not `splitlines`: JSON may hold the other ends of lines that Unicode has.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                lines.append(parse_json(line))
            except ValueError as error:
                raise InputError(
                    f"Line {number} of {file} is not valid JSON: {first_line(error)}."
                ) from error
    return lines
