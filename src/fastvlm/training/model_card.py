"""A draft's model card: target, training data and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import fastvlm
from fastvlm.drafting import ImitationNetwork
from fastvlm.functional.files import write_text
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.held_out import Decoded

CARD_TEMPLATE = """\
---
library_name: fastvlm
tags:
- speculative-decoding
- vision-language-model
---

# A draft for {card.model}

An imitation network ({config.kind}, exit layer {config.exit_layer}, {parameters:,} parameters)
that drafts tokens for {card.model}, which verifies them: the tokens stay the model's own.

```python
import fastvlm

vlm = fastvlm.load("{card.model}", draft="path/to/this/folder")
```

| on {card.questions} held-out questions | |
|---|---|
| acceptance rate | {found.acceptance_rate:.3f} |
| acceptance length (tokens a pass of the model) | {found.acceptance_length:.2f} |
| speedup of decoding, median (quartiles) | {speedup} |

Measured on {card.hardware}, {date}, fastvlm {version}, torch {torch}.

- Data: {data}.
- Replies: {card.replies}.
- Loss: KL + {card.plan.cosine:g} (1 - cos) + {card.plan.cross_entropy:g} CE; {start}.

A draft is derived from the model's weights and from the data: the terms of both apply to it.
"""


@dataclass(frozen=True, slots=True)
class Card:
    """The contents of a draft's model card, besides the draft's own settings.

    Args:
        model: The target's name.
        data: The data sets.
        replies: Who wrote the replies that the draft learns from.
        plan: The draft's training plan.
        questions: The number of held-out questions that were decoded.
        hardware: The hardware that they were decoded on.
    """

    model: str
    data: Sequence[str]
    replies: str
    plan: DraftPlan
    questions: int
    hardware: str

    def write(self, folder: Path, network: ImitationNetwork, found: Decoded) -> None:
        """Write `README.md` into a draft's folder.

        Args:
            folder: The folder.
            network: The draft.
            found: Its results on held-out questions.
        """
        spread = found.speedup
        text = CARD_TEMPLATE.format(
            card=self,
            config=network.config,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            found=found,
            speedup=f"{spread.median:.2f}x ({spread.low:.2f}-{spread.high:.2f})",
            data=", ".join(self.data),
            start="it started as the layers it stands for"
            if not self.plan.random_start
            else "it started at random",
            date=datetime.now(UTC).date().isoformat(),
            version=fastvlm.__version__,
            torch=torch.__version__,
        )
        write_text(folder / "README.md", text)
