"""Internal errors: the sentence that the user sees, and the report for maintainers."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata

from fastvlm.functional.errors import first_line

DEBUG_VARIABLE = "FASTVLM_DEBUG"
"""The environment variable for showing tracebacks instead of writing reports."""
REPORTED_PACKAGES = ("fastvlm", "torch", "transformers", "tokenizers", "safetensors", "accelerate",
                     "pillow", "typer", "rich")  # fmt: skip


def memory_sentence(error: BaseException) -> str:
    """Return a sentence that says what to do when memory runs out."""
    what = str(error).strip()
    told = f" ({first_line(error)})" if what and isinstance(error, Exception) else ""
    return (
        f"There is not enough memory{told}: use --dtype bfloat16, smaller images, fewer tokens"
        " (--max-new-tokens), fewer things at a time (--batch) or a smaller model."
    )


def crash_sentence(error: Exception, arguments: Sequence[str]) -> str:
    """Write a report of an internal error, and return the sentence to show for it.

    Args:
        error: The error.
        arguments: The words of the command line after `fastvlm`.
    """
    what = f"{type(error).__name__}: {first_line(error)}"
    try:
        file = write_report(error, arguments)
    except OSError:
        return f"fastvlm failed, which is a fault of its own ({what})."
    return f"fastvlm failed, which is a fault of its own ({what}); a report of it is in {file}."


def write_report(error: BaseException, arguments: Sequence[str]) -> str:
    """Write a report of an error to a new file, and return its path.

    It contains neither the environment nor the values of variables.

    Raises:
        OSError: It can't be written.
    """
    versions = [f"{name} {_version(name)}" for name in REPORTED_PACKAGES]
    lines = [
        f"fastvlm failed at {datetime.now(UTC).isoformat(timespec='seconds')}.",
        "",
        f"Command line: {shlex.join(['fastvlm', *arguments])}",
        f"Python {platform.python_version()} on {platform.platform()}",
        f"Installed: {', '.join(versions)}",
        "",
        *traceback.format_exception(error),
    ]
    # A name that nobody can foresee, in a file that only its owner reads.
    descriptor, file = tempfile.mkstemp(prefix="fastvlm-", suffix=".txt", text=True)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as opened:
        opened.write("\n".join(lines))
    return file


def shows_traceback() -> bool:
    """Return whether to show an internal error's traceback, for those who work on fastvlm."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def print_traceback(error: BaseException) -> None:
    """Write an error's traceback to standard error."""
    traceback.print_exception(error, file=sys.stderr)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
