"""`fastvlm train model`: a model itself, in the paper's stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastvlm.cli.files import check_folder
from fastvlm.cli.loading import UsageError, resolve_model
from fastvlm.cli.terminal import PlainConsole
from fastvlm.cli.training_options import (
    CheckpointingOption,
    ModelTrainingRuntime,
    OutputOption,
    TrackerOption,
    WorkersOption,
    conversations_in,
    workers_of,
)
from fastvlm.functional.errors import InputError
from fastvlm.training.schedule import Accumulation, Seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastvlm.data.conversations import Records, Shards
    from fastvlm.training.paper_stages import PaperStage


@dataclass(frozen=True, slots=True)
class ModelParts:
    """The model to train, or what a new one is made of."""

    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The model to train: a directory, or a name on the hub."),
    ] = None
    encoder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A FastViTHD, or a model with one: for a new model, or in place of --model's own.",
        ),
    ] = None
    decoder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For a new model: a language model.")
    ] = None


@dataclass(frozen=True, slots=True)
class StageOptions:
    """A stage of the paper, and what of it is overridden."""

    stage: Annotated[
        Literal["1", "1.5", "2", "3"],
        typer.Option(help="The paper's stage; 1 trains the projector, the others everything."),
    ] = "2"
    learns: Annotated[
        Literal["projector", "decoder", "everything", "lora"] | None,
        typer.Option(
            help="What learns: decoder is all but the encoder, lora the projector and an adapter"
            " beside each of the decoder's linear layers.",
            show_default="the stage's",
        ),
    ] = None
    objective: Annotated[
        Literal["replies", "words", "consensus"],
        typer.Option(
            help="What is learnt of the data: its replies; as a cheap start of a new projector,"
            " visual tokens near the embeddings of the replies' words (stage 1); or sentences of"
            " the model's own that agree with an image's captions.",
        ),
    ] = "replies"
    lora_rank: Annotated[
        int, typer.Option(metavar="N", min=1, max=65536, help="Rank of the adapters.")
    ] = 64
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=64,
            max=16384,
            help="Side of the images, a multiple of 64.",
            show_default="the stage's",
        ),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1_000_000,
            help="Conversations in a step.",
            show_default="the stage's",
        ),
    ] = None
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.001,
            max=1e6,
            help="Times that the data is shown.",
            show_default="the stage's",
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=2**31 - 1,
            help="Optimiser steps in all.",
            show_default="what the epochs make",
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="X", min=1e-8, max=1, help="The peak.", show_default="the stage's"),
    ] = None


@dataclass(frozen=True, slots=True)
class ModelRun:
    """How a step is computed, and what is told of it."""

    seed: Seed = 0
    accumulation: Accumulation = 1
    gradient_checkpointing: CheckpointingOption = False
    workers: WorkersOption = None
    tracker: TrackerOption = None


def model(
    *,
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="What it learns from: a folder, file, shards or hub data set of conversations or"
            " captions, or scenes:N for rendered scenes.",
        ),
    ],
    output: OutputOption,
    parts: ModelParts,
    recipe: StageOptions,
    run: ModelRun,
    runtime: ModelTrainingRuntime,
) -> None:
    """Teach a model what the assistant says in conversations, in the paper's stages.

    A stage's figures are the paper's; each has an option that overrides it. A new model is made of
    an encoder and a decoder.
    """
    check_folder(output)
    if (parts.model is None) == (parts.decoder is None) or (
        parts.decoder is not None and parts.encoder is None
    ):
        raise UsageError("Give --model, or --encoder and --decoder for a new one.")
    if parts.model is not None and Path(parts.model).resolve() == output.resolve():
        raise UsageError("--output is the model itself, from which the run starts; give another.")
    runtime.prepare()
    from fastvlm.training.instruction import tune_model
    from fastvlm.training.paper_stages import PAPER_STAGES
    from fastvlm.training.words import teach_words

    given = {
        "objective": recipe.objective,
        "learns": recipe.learns,
        "image_size": recipe.image_size,
        "batch": recipe.batch,
        "epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
    }
    target, processor = loaded_or_new(parts.model, parts.encoder, parts.decoder)
    chosen = fitting(target, PAPER_STAGES[recipe.stage], given)
    if chosen.objective == "words" and chosen.learns != "projector":
        raise UsageError("--objective words teaches the projector alone; give --stage 1.")
    source = conversations_in(data, shown_at(target, chosen))
    schedule = replace(
        chosen.schedule(steps_of(chosen, source, data, recipe.steps)),
        seed=run.seed,
        precision=runtime.mixed_precision,
        accumulation=run.accumulation,
        trackers=tuple(run.tracker or ()),
        workers=workers_of(run.workers),
    )
    with runtime.progress():
        if chosen.objective == "words":
            teach_words(target, processor, source, chosen, schedule, output)
        else:
            tune_model(
                target,
                processor,
                source,
                chosen,
                schedule,
                output,
                rank=recipe.lora_rank,
                gradient_checkpointing=run.gradient_checkpointing,
            )
    PlainConsole().print(
        f"Stage {recipe.stage} ({chosen.learns}), {schedule.steps:,} steps of {chosen.batch}; saved"
        f" in {output}."
    )


def loaded_or_new(
    model: str | None, encoder: Path | None, decoder: Path | None
) -> tuple[PreTrainedModel, Any]:
    """Return a model in float32, loaded (maybe with another encoder) or new, and its processor.

    Raises:
        CheckpointError: A part can't be read.
        InputError: The parts make no model.
    """
    import torch

    from fastvlm.checkpoints import load_checkpoint
    from fastvlm.training.assembly import assemble, read_encoder, replace_encoder

    place = resolve_model(model)
    if place is not None:
        target, processor = load_checkpoint(place, torch.float32, "cpu")
        if encoder is not None:
            replace_encoder(target, read_encoder(encoder))
        return target, processor
    assert encoder is not None  # what is given was checked
    assert decoder is not None
    return assemble(read_encoder(encoder), decoder)


def fitting(model: PreTrainedModel, stage: PaperStage, given: dict[str, Any]) -> PaperStage:
    """Return a stage with what was given instead, and no size for a model that has its own."""
    if not has_fastvithd(model):
        stage = replace(stage, image_size=None)
    return replace(stage, **{name: value for name, value in given.items() if value is not None})


def has_fastvithd(model: PreTrainedModel) -> bool:
    """Say whether a model is one around FastViTHD."""
    from fastvlm.vision import FastViTHD

    return isinstance(getattr(model.base_model, "vision_tower", None), FastViTHD)


def shown_at(model: PreTrainedModel, stage: PaperStage) -> int | None:
    """Return the side in pixels of the images of a stage; None where the processor decides."""
    if not has_fastvithd(model):
        return None
    own: int = model.config.vision_config.image_size
    return own if stage.image_size is None else stage.image_size


def steps_of(stage: PaperStage, source: Records | Shards, name: str, steps: int | None) -> int:
    """Return the steps of a run.

    Raises:
        InputError: The data's length is not known, and no number of steps is given.
    """
    from fastvlm.data.conversations import Records

    if steps is not None:
        return steps
    if not isinstance(source, Records):
        raise InputError(f"{name} is streamed: say how long to learn with --steps.")
    return stage.steps(len(source))
