"""`fastvlm train`: a model, a draft of a model, and the model that ships."""

from __future__ import annotations

import typer

from fastvlm.cli.train_draft import draft
from fastvlm.cli.train_example import example_encoder, example_model
from fastvlm.cli.train_model import model

app = typer.Typer(
    rich_markup_mode="markdown",
    no_args_is_help=True,
    help="Train a model, or a draft for one."
    " A run that was stopped goes on from its checkpoint when the same command is given again.",
)
app.command()(model)
app.command()(draft)
app.command()(example_encoder)
app.command()(example_model)
