"""The task of a model itself: to say what the assistant says in conversations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.data.conversations import Records, Shards
from fastvlm.data.feed import Feed
from fastvlm.functional.digests import digest_of_weights
from fastvlm.functional.files import written_into
from fastvlm.functional.placement import moved
from fastvlm.language.structure import text_decoder
from fastvlm.training.assembly import show_images_of
from fastvlm.training.consensus import ConsensusTask, consensus_task
from fastvlm.training.digests import digest_of_source
from fastvlm.training.loop import train
from fastvlm.training.paper_stages import PaperStage
from fastvlm.training.parts import computed_in, learning
from fastvlm.training.processes import this_process
from fastvlm.training.reply_scores import reply_loss
from fastvlm.training.rows import RowBuilder, RowMaker, TrainingRow, rows_for
from fastvlm.training.schedule import Schedule
from fastvlm.training.sharding import whole_state
from fastvlm.training.step_feed import StepFeed
from fastvlm.training.task import ExampleStream, Losses


class SupervisedTask(ABC):
    """Teaches a model replies: cross-entropy at each of their tokens. A subclass draws the rows.

    BatchNorms keep the statistics that they came with: those of a step's few images would be
    poor ones, and what is trained is then exactly what inference folds.

    Args:
        model: The model; what of it requires a gradient learns.
        rows: What makes its rows.
        plan: See `TrainingTask`.
        source: See `TrainingTask`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: RowBuilder,
        plan: Mapping[str, Any] | None = None,
        source: ExampleStream | None = None,
    ) -> None:
        self.model = model.eval()
        # Gradient checkpointing asks for this mode.
        text_decoder(model).train()
        self.module: nn.Module = model
        self.unit = "tokens"
        self.plan: Mapping[str, Any] = plan or {}
        self.source = source
        self.whole: str | None = None
        self.rows = rows

    @abstractmethod
    def draw(self, step: int) -> list[TrainingRow]:
        """Return the rows of a step. See `TrainingTask.draw`."""

    def loss(self, examples: Sequence[TrainingRow]) -> Losses:
        """Return the cross-entropy of some rows, see `reply_loss`."""
        return reply_loss(self.model, self.rows, examples)


class InstructionTask(SupervisedTask):
    """Teaches a model the replies of a feed's conversations.

    Args:
        model: See `SupervisedTask`.
        rows: See `SupervisedTask`.
        feed: The conversations.
        batch: Conversations that this process takes in a step.
        plan: See `TrainingTask`.
        workers: Processes that prepare conversations ahead of the step that takes them; those of
            a step are held ready. What is learnt is the same for any number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: RowBuilder,
        feed: Feed,
        batch: int,
        plan: Mapping[str, Any] | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__(model, rows, plan, feed)
        self.conversations = StepFeed(feed, RowMaker(rows), batch, workers)

    def draw(self, step: int) -> list[TrainingRow]:
        """Return the rows of a step. See `StepFeed.draw`."""
        return [row for rows in self.conversations.draw() for row in rows]

    def close(self) -> None:
        """End the workers. See `StepFeed.close`."""
        self.conversations.close()


def tune_model(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    source: Records | Shards,
    stage: PaperStage,
    schedule: Schedule,
    output: Path,
    *,
    rank: int = 64,
    gradient_checkpointing: bool = False,
) -> None:
    """Train a model on conversations and save it, in bfloat16 and ready to load, as `output`.

    An encoder that is not folded stays so, and can be trained on.

    Args:
        model: The model, in float32.
        processor: Its processor, or its tokenizer alone.
        source: The conversations.
        stage: What learns, and from how large images and steps.
        schedule: Length and learning rate.
        output: The directory of the model in the end, and of the checkpoint, in `training`.
        rank: Of LoRA's adapters.
        gradient_checkpointing: Whether layers are computed again on the way back, to save memory.

    Raises:
        InputError: The model has no such part or can't be trained, or too many records are broken.
        LostWorkerError: A worker was ended from outside.
    """
    torch.manual_seed(schedule.seed)
    process = this_process()
    moved(model, process.device)
    rows = rows_for(model, processor, stage.image_size)
    feed = Feed(
        source, seed=schedule.seed, process=process.process_index, processes=process.num_processes
    )
    if gradient_checkpointing:
        # Newer releases of transformers have another name for it.
        newer: Any = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    plan = {
        "learns": stage.learns,
        "image_size": stage.image_size,
        "batch": stage.batch,
        "rank": rank if stage.learns == "lora" else None,
        "model": digest_of_weights(model),
        "data": digest_of_source(source),
    }
    frozen = torch.bfloat16 if schedule.precision == "bf16" else model.dtype
    batch = max(1, stage.batch // process.num_processes)
    task: InstructionTask | ConsensusTask
    if stage.objective == "consensus":
        plan["objective"] = stage.objective
        task = consensus_task(model, rows, source, feed, batch, plan, schedule.workers)
    else:
        task = InstructionTask(model, rows, feed, batch, plan, schedule.workers)
    with (
        learning(model, stage.learns, rank),
        computed_in(model, frozen),
        closing(task),
    ):
        train(task, schedule, output / "training")
    if stage.image_size is not None:
        show_images_of(model, stage.image_size)
    save_tuned(model, processor, output)


def save_tuned(
    model: PreTrainedModel, processor: PreTrainedTokenizerBase | ProcessorMixin, output: Path
) -> None:
    """Save a model in bfloat16; every process calls this, and process 0 writes."""
    state = whole_state(moved(model, torch.bfloat16))
    if this_process().is_main_process:
        with written_into(output, last="config.json") as beside:
            processor.save_pretrained(beside)
            model.save_pretrained(beside, state_dict=state)
