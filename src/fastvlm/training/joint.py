"""The joint phase: a target is fine-tuned with the loss of an exit beside the final one.

The frozen phase, in which an imitation network learns from the target as it is, follows
(`fastvlm.training.draft`); arXiv 2510.22641 trains in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.functional.files import written_into
from fastvlm.functional.placement import moved
from fastvlm.language.structure import text_decoder
from fastvlm.training.digests import digest_of_examples
from fastvlm.training.draws import ExampleDraws
from fastvlm.training.forcing import ExampleCache, Forced, GradientCache, TeacherForcing
from fastvlm.training.loop import train
from fastvlm.training.processes import reached, this_process
from fastvlm.training.replies import Example
from fastvlm.training.schedule import Schedule
from fastvlm.training.sharding import whole_state
from fastvlm.training.target import full_precision
from fastvlm.training.task import ExampleStream, Losses
from fastvlm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class JointPlan:
    """How a target is fine-tuned.

    Args:
        exit_layer: Layers that run before the exit (k).
        weight: Of the exit's loss beside the final one.
        batch: Examples in a step.
    """

    exit_layer: int
    weight: float = 1.0
    batch: int = 24


class JointTask:
    """Teaches a target replies at its last layer and at an exit, through the same norm and head.

    The decoder's layers and its final norm learn. Embeddings, LM head and encoder stay as they are,
    so that prompts are encoded once.

    Args:
        vlm: The target, in the precision that its weights are trained in.
        examples: What it learns from.
        plan: How.
    """

    def __init__(
        self, vlm: VisionLanguageModel, examples: Sequence[Example], plan: JointPlan
    ) -> None:
        self.vlm, self.examples, self.joint = vlm, examples, plan
        vlm.model.requires_grad_(False)
        text_decoder(vlm.model).requires_grad_(True)
        fixed = (vlm.model.get_input_embeddings(), vlm.model.get_output_embeddings())
        for part in fixed:
            part.requires_grad_(False)
        self.module: nn.Module = vlm.model
        self.forcing = TeacherForcing(vlm, ExampleCache())
        self.unit = "tokens"
        self.plan: Mapping[str, Any] = {
            **asdict(plan),
            "target": fingerprint(vlm.model),
            "examples": digest_of_examples(examples),
        }
        self.source: ExampleStream | None = None
        self.whole: str | None = None
        self.draws = ExampleDraws(self.forcing, examples, plan.batch)

    def draw(self, step: int) -> list[Example]:
        """Return the examples of a step."""
        return self.draws(step)

    def loss(self, examples: Sequence[Example]) -> Losses:
        """Return the cross-entropy at the last layer plus that at the exit, weighed.

        Both are at every token of the replies; the report has each of them.
        """
        decoder, cache = self.vlm.decoder, GradientCache()
        forced = self.forcing.batch(examples, given=0)
        exit_layer = self.joint.exit_layer
        x = decoder.forward_layers(forced.x, forced.positions, cache, range(exit_layer))
        early = self.cross_entropy(x, forced)
        x = decoder.forward_layers(x, forced.positions, cache, range(exit_layer, decoder.depth))
        final = self.cross_entropy(x, forced)
        number = len(forced.targets)
        report = {
            "final": (float(final.detach()), number),
            f"exit {exit_layer}": (float(early.detach()), number),
        }
        return Losses(final + self.joint.weight * early, number, report)

    def cross_entropy(self, x: Tensor, forced: Forced) -> Tensor:
        """Return the summed cross-entropy of a layer's states, (batch, length, d_model)."""
        logits = full_precision(self.vlm.decoder.head(x[forced.loss_mask]))
        return F.cross_entropy(logits, forced.targets, reduction="sum")


def train_joint(
    vlm: VisionLanguageModel,
    examples: Sequence[Example],
    plan: JointPlan,
    schedule: Schedule,
    output: Path,
) -> None:
    """Fine-tune a target with the loss of an exit and save it, in bfloat16, as `output`.

    Args:
        vlm: The target, which changes.
        examples: What it learns from.
        plan: How.
        schedule: Length and learning rate.
        output: The directory of the target in the end, and of the checkpoint, in `training`.

    Raises:
        InputError: An image can't be read.
    """
    task = JointTask(vlm, examples, plan)
    with task.draws.ahead(schedule):
        train(task, schedule, output / "training")
    state = whole_state(moved(vlm.model, torch.bfloat16))
    if this_process().is_main_process:
        with written_into(output, last="config.json") as beside:
            vlm.processor.save_pretrained(beside)
            vlm.model.save_pretrained(beside, state_dict=state)
    # The others load it next.
    with reached():
        this_process().wait_for_everyone()
