"""`fastvlm train`: a model, a draft of a model, and the model that ships."""

from __future__ import annotations

from fastvlm.cli.command import add_verb, verbs
from fastvlm.cli.train_draft import draft
from fastvlm.cli.train_example import example_encoder, example_model
from fastvlm.cli.train_model import model

app = verbs(
    "Train a model, or a draft for one."
    " A run that was stopped goes on from its checkpoint when the same command is given again.",
)
for verb in (model, draft, example_encoder, example_model):
    add_verb(app, verb)
