"""An encoder's model card: its teacher, its training data and how much of the teacher it learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import fastvlm
from fastvlm.functional.files import write_text
from fastvlm.training.distillation_plan import DistillationPlan
from fastvlm.training.schedule import Schedule
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD

CARD_TEMPLATE = """\
---
library_name: fastvlm
tags:
- fastvithd
- image-feature-extraction
---

# A FastViTHD taught by {card.teacher}

A vision encoder (depths {config.depths}, widths {config.widths}, {parameters:,} parameters, form
`{config.form}`): {side} x {side} features of width {config.hidden_size} for an image of
{config.image_size} px. A model is made around it by

```sh
fastvlm train model --encoder path/to/this/folder --decoder DIR --stage 1 ...
```

| on {card.held_out} held-out images | |
|---|---|
{measures}

`explained` is the share of the variance of the teacher's features that a linear map of this
encoder's explains.

- Data: {data}; {card.images:,} images.
- {card.schedule.steps:,} steps of {card.plan.batch} crops with a peak learning rate of
  {card.schedule.learning_rate:g}; crops of at least {card.plan.smallest_crop:g} of a side, mixup
  {card.plan.mixup:g}; {start}.
- {date}, fastvlm {version}, torch {torch}.

An encoder is derived from its teacher and from the data: the terms of both apply to it.
"""


@dataclass(frozen=True, slots=True)
class EncoderCard:
    """The contents of an encoder's model card, besides its own settings.

    Args:
        teacher: The teacher's name.
        start: What it went on from; None where it began at random.
        data: The data sets.
        images: The number of images that it learnt from.
        held_out: The number of images that it was measured on.
        plan: What its steps showed.
        schedule: The length and learning rate of the run.
    """

    teacher: str
    start: str | None
    data: Sequence[str]
    images: int
    held_out: int
    plan: DistillationPlan
    schedule: Schedule

    def write(self, folder: Path, encoder: FastViTHD, measures: Mapping[str, float]) -> None:
        """Write `README.md` into an encoder's folder.

        Args:
            folder: The folder.
            encoder: The encoder.
            measures: Its results on held-out images.
        """
        rows = [
            f"| {name.removeprefix('held-out ')} | {value:.3f} |"
            for name, value in measures.items()
        ]
        text = CARD_TEMPLATE.format(
            card=self,
            config=encoder.config,
            parameters=encoder.num_parameters(),
            side=encoder.config.image_size // REDUCTION,
            measures="\n".join(rows),
            data=", ".join(self.data),
            start="it began at random" if self.start is None else f"it went on from {self.start}",
            date=datetime.now(UTC).date().isoformat(),
            version=fastvlm.__version__,
            torch=torch.__version__,
        )
        write_text(folder / "README.md", text)
