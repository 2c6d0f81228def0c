"""The process's standard streams, which may be closed, full or limited to ASCII."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

STREAM_NAMES = ("stdin", "stdout", "stderr")


def prepare_streams() -> None:
    """Let standard output and error take any text, and replace closed streams.

    Characters that the encoding lacks are escaped. A closed stream becomes a null device: otherwise
    the next file to be opened would get its descriptor, and with it what is written to the stream.
    """
    for descriptor, name in enumerate(STREAM_NAMES):
        stream: Any = getattr(sys, name)
        if stream is None:
            stream = _null(descriptor, "r" if name == "stdin" else "w")
            setattr(sys, name, stream)
        if name != "stdin" and hasattr(stream, "reconfigure"):
            # This flushes: what can't be written is told when it is the verb's.
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def _null(descriptor: int, mode: str) -> Any:
    try:
        os.fstat(descriptor)
    except OSError:
        # The lowest free descriptor is given out first: this one, as those below it are open.
        os.open(os.devnull, os.O_RDWR)
    # What has taken the descriptor meanwhile is not ours to write to.
    return open(os.devnull, mode, encoding="utf-8")  # noqa: PTH123 (it stays open)


def flush_output() -> None:
    """Flush standard output.

    Raises:
        OSError: It can't be written: its disk is full, or its reader is gone.
    """
    sys.stdout.flush()


def abandon_output() -> None:
    """Discard what standard output has buffered, as it can't be written."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def printable(text: str) -> str:
    """Return a text as one line, with control characters escaped."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
