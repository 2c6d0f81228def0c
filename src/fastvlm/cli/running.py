"""Running a command line up to its exit code."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from types import FrameType
from typing import Any

import typer

from fastvlm.cli.crash import (
    crash_sentence,
    memory_sentence,
    print_traceback,
    shows_traceback,
)
from fastvlm.cli.installation import torchvision_mismatch
from fastvlm.cli.loading import UsageError
from fastvlm.cli.streams import abandon_output, flush_output
from fastvlm.cli.terminal import plain_warnings, print_aside, print_error
from fastvlm.functional.errors import FastVlmError, is_out_of_memory

# Typer has its own copy of click or uses the installed one, depending on its version.
TyperUsageError: type[Exception] = typer.BadParameter.__bases__[0]

FAILURE_EXIT_CODE, USAGE_EXIT_CODE, SIGNAL_EXIT_CODE_BASE = 1, 2, 128
"""Exit codes of a failure, of a wrong command line, and of a signal, whose number is added."""
BROKEN_PIPE_EXIT_CODE = (
    SIGNAL_EXIT_CODE_BASE + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else FAILURE_EXIT_CODE
)
TERMINATION_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
]
"""Signals that would end the process at once and leave incomplete files."""


def run_verb(arguments: Sequence[str], app: typer.Typer | None = None) -> int:
    """Run a command, print one sentence on any error, and return the exit code.

    Args:
        arguments: The words after `fastvlm`.
        app: The commands; None for those of `fastvlm`.
    """
    try:
        with plain_warnings(), ended_by_signals():
            code = invoked(arguments, app)
            flush_output()
    except SystemExit as left:
        # A signal, or typer's own completion.
        return left.code if isinstance(left.code, int) else 0
    except Exception as error:  # noqa: BLE001 (no traceback is for a user)
        return failed(error, arguments)
    return code


def invoked(arguments: Sequence[str], app: typer.Typer | None = None) -> int:
    """Run a command and return its exit code.

    Typer's own handling of errors and signals is bypassed.

    Raises:
        Exception: Any error of the command, or of parsing its command line.
    """
    from fastvlm.cli.verbs import command

    root: Any = command() if app is None else typer.main.get_command(app)
    root._main_shell_completion({}, "fastvlm")
    try:
        with root.make_context("fastvlm", list(arguments)) as context:
            root.invoke(context)
    except typer.Exit as left:
        return left.exit_code
    return 0


def failed(error: Exception, arguments: Sequence[str]) -> int:
    """Print what went wrong, and return the exit code.

    Args:
        error: The error.
        arguments: The words of the command line after `fastvlm`.
    """
    if isinstance(error, BrokenPipeError):
        # As others that write to `head`: whoever read has seen enough.
        abandon_output()
        return BROKEN_PIPE_EXIT_CODE
    if isinstance(error, TyperUsageError | UsageError):
        print_usage(error)
        return USAGE_EXIT_CODE
    if reason := sentence_of(error):
        print_error(reason)
        # A run that was asked to stop, and has saved what it had.
        stopped = getattr(error, "signal_number", None)
        return FAILURE_EXIT_CODE if stopped is None else SIGNAL_EXIT_CODE_BASE + stopped
    if shows_traceback():
        print_traceback(error)
    else:
        print_error(crash_sentence(error, arguments))
    return FAILURE_EXIT_CODE


def print_usage(error: Any) -> None:
    """Print what is wrong with a command line, or the list of commands if it has none."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print_aside(error.format_message())
        return
    told = error.format_message() if hasattr(error, "format_message") else str(error)
    # What pydantic adds, and older versions of typer.
    told = told.replace("Value error, ", "").replace(" (env var: 'None')", "").rstrip(".")
    if hasattr(error.__cause__, "errors"):
        # What pydantic refuses for its size, it doesn't say.
        given = error.__cause__.errors()[0].get("input")
        told = told if repr(given) in told else f"{told}; got {given!r}"
    if possible := getattr(error, "possibilities", None):
        [closest] = get_close_matches(error.option_name, possible, 1, 0.0)
        told = f"{error.message.rstrip('.')}. Did you mean {closest}?"
    print_error(told)


def sentence_of(error: Exception) -> str | None:
    """Return the sentence to show for an error; None for an internal error."""
    if reason := torchvision_mismatch(error):
        return reason
    if is_out_of_memory(error):
        return memory_sentence(error)
    if isinstance(error, FastVlmError):
        return str(error)
    if isinstance(error, OSError):
        return _of_the_system(error)
    return None


def _of_the_system(error: OSError) -> str | None:
    """Return what the system refused, and where."""
    if not error.strerror:
        # What another library says.
        return str(error) or None
    what = error.strerror[0].lower() + error.strerror[1:]
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {what}"
    try:
        # It still holds back what it could not write.
        flush_output()
    except OSError:
        abandon_output()
        return f"Standard output can't be written: {what}"
    # Where nothing is held back (`python -u`), it can't be told from a file that says no name.
    return f"Standard output or a file can't be written: {what}"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn signals that would end the process into `SystemExit`, so that it can clean up first.

    Raises:
        SystemExit: A signal arrived; the code is 128 plus its number, as in a shell.
    """

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(SIGNAL_EXIT_CODE_BASE + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in TERMINATION_SIGNALS:
            # What has been told otherwise, as by `nohup`, stays so.
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
