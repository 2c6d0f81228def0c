"""`fastvlm train`: a model, or a draft for one."""

from __future__ import annotations

from fastvlm.cli.command import add_verb, verbs
from fastvlm.cli.train_draft import draft
from fastvlm.cli.train_model import model

app = verbs(
    "Train a model, or a draft for one."
    " A run that was stopped goes on from its checkpoint when the same command is given again.",
)
for verb in (model, draft):
    add_verb(app, verb)
