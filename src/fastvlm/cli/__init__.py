"""The command line: `fastvlm demo`, `generate`, `benchmark`, ..., one file a verb."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

INTERRUPTED_EXIT_CODE = 130


def run(arguments: Sequence[str] | None = None, app: Any = None) -> int:
    """Run a command line and return its exit code.

    0 is success; 1 an error with an image, a model, a disk or an installation, or an internal
    error, of which a report is written; 2 an error in the command line. Each is explained in one
    sentence on standard error. A signal ends with 128 plus its number: 130 for Ctrl-C, 143 for
    SIGTERM, 141 where nobody reads the output any more.

    Args:
        arguments: The words after `fastvlm`; None for those of the process.
        app: The commands, a `typer.Typer`; None for those of `fastvlm`.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        # Ctrl-C may arrive while these are imported.
        from fastvlm.cli.running import run_verb
        from fastvlm.cli.streams import prepare_streams

        prepare_streams()
        return run_verb(sys.argv[1:] if arguments is None else arguments, app)
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))
