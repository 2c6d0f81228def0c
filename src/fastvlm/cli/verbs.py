"""All verbs, under their names."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

import typer

from fastvlm.cli.audit import audit
from fastvlm.cli.benchmark import benchmark
from fastvlm.cli.caption import caption
from fastvlm.cli.command import add_verb, verbs
from fastvlm.cli.convert import convert
from fastvlm.cli.crash import DEBUG_VARIABLE
from fastvlm.cli.demo import demo
from fastvlm.cli.evaluate import evaluate
from fastvlm.cli.export import app as export
from fastvlm.cli.generate import generate
from fastvlm.cli.serve import serve
from fastvlm.cli.train import app as train

app = verbs(
    "Vision-language models with identical output and lower latency.",
    name="fastvlm",
    add_completion=True,
    epilog="Exit codes: 0; 1 where something failed, 2 for a wrong command line, 130 after Ctrl-C."
    f" {DEBUG_VARIABLE}=1 shows the traceback of a failure of fastvlm's own.",
)
for verb in (demo, generate, caption, serve, benchmark, audit, evaluate, convert):
    add_verb(app, verb)
app.add_typer(export, name="export")
app.add_typer(train, name="train")


def print_version(wanted: bool) -> None:
    """Print the version and exit, if asked to."""
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


@cache
def command() -> Any:
    """Return the command line as a click command."""
    return typer.main.get_command(app)
