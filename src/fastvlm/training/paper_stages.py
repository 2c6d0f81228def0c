"""The stages in which the paper trains a FastVLM (arXiv 2412.13303)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastvlm.training.schedule import Schedule

WARMUP = 0.03
"""The share of a stage's steps in which its learning rate rises."""


@dataclass(frozen=True, slots=True)
class PaperStage:
    """A stage of a FastVLM's training.

    Args:
        learns: One of `PARTS`.
        learning_rate: The peak.
        image_size: Side in pixels of the images; None for the model's own.
        batch: Conversations in a step, of all processes together.
        epochs: How often each conversation is shown.
        data: What the paper trains it on, in words.
        objective: What is learnt of the data: its `replies`; as a start, their `words`; or the
            `consensus` of an image's captions.
    """

    learns: str
    learning_rate: float
    image_size: int | None
    batch: int
    epochs: float
    data: str
    objective: str = "replies"

    def steps(self, conversations: int) -> int:
        """Return the steps that so many conversations make."""
        return max(1, math.ceil(self.epochs * conversations / self.batch))

    def schedule(self, steps: int) -> Schedule:
        """Return the stage's schedule: no weight decay, as LLaVA has it."""
        return Schedule(
            steps=steps,
            learning_rate=self.learning_rate,
            warmup=round(WARMUP * steps),
            weight_decay=0.0,
        )


PAPER_STAGES = {
    "1": PaperStage("projector", 1e-3, None, 256, 1, "558K captions (LLaVA-558K)"),
    "1.5": PaperStage("everything", 2e-5, 1024, 128, 1, "15M recaptioned images"),
    "2": PaperStage("everything", 2e-5, 1024, 128, 1, "visual instructions"),
    "3": PaperStage("everything", 2e-5, 1024, 128, 1, "visual instructions of high quality"),
}
"""The paper's stages, by their names; `docs/model.md` says where each figure is from."""
