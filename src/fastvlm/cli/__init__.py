"""The command line: `fastvlm demo`, `generate`, `benchmark`, ..., one file a verb."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from fastvlm.cli.audit import audit
from fastvlm.cli.benchmark import app as benchmark
from fastvlm.cli.convert import convert
from fastvlm.cli.demo import demo
from fastvlm.cli.evaluate import evaluate
from fastvlm.cli.export import app as export
from fastvlm.cli.generate import generate
from fastvlm.cli.installation import torchvision_mismatch
from fastvlm.cli.loading import UsageError
from fastvlm.cli.terminal import plain_warnings, print_error
from fastvlm.cli.train import app as train
from fastvlm.functional.errors import FastVlmError

# Typer has its own copy of click or uses the installed one, depending on its version.
TyperUsageError: type[Exception] = typer.BadParameter.__bases__[0]

USAGE, INTERRUPTED = 2, 130

app = typer.Typer(
    name="fastvlm",
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(generate)
app.command()(audit)
app.command()(evaluate)
app.command()(convert)
app.add_typer(export, name="export")
app.add_typer(benchmark, name="benchmark")
app.add_typer(train, name="train")


def print_version(wanted: bool) -> None:
    """Print the version and leave, if that is what was asked for."""
    if wanted:
        from fastvlm import __version__

        typer.echo(f"fastvlm {__version__}")
        raise typer.Exit


@app.callback()
def fastvlm(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    """Vision-language models with identical output and lower latency."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    What a user can mend is told in one sentence on standard error: 1 for an image, a model or an
    installation that is wrong, 2 for a command line that is. Ctrl-C ends with 130.

    Args:
        arguments: The words after `fastvlm`; None for the process's own.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with plain_warnings():
            code = app(args=arguments, prog_name="fastvlm", standalone_mode=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except TyperUsageError as error:
        print_error(error.format_message() if hasattr(error, "format_message") else str(error))
        return USAGE
    except (FastVlmError, ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = torchvision_mismatch(error)
        if reason is None and not isinstance(error, FastVlmError | OSError):
            raise
        print_error(reason or str(error))
        return USAGE if isinstance(error, UsageError) else 1
    return code or 0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))
