"""`fastvlm train`: a model, a draft for one, or an encoder."""

from __future__ import annotations

from fastvlm.cli.command import add_verb, verbs
from fastvlm.cli.train_draft import draft
from fastvlm.cli.train_encoder import encoder
from fastvlm.cli.train_model import model

app = verbs(
    "Train a model, a draft for one, or an encoder."
    " A run that was stopped goes on from its checkpoint when the same command is given again.",
)
for verb in (model, draft, encoder):
    add_verb(app, verb)
