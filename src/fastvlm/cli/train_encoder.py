"""`fastvlm train encoder`: a FastViTHD, taught a teacher's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm.cli.files import FiguresOutput, check_folder
from fastvlm.cli.loading import UsageError, usage
from fastvlm.cli.training_options import (
    ModelTrainingRuntime,
    OutputOption,
    TrackerOption,
    WorkersOption,
    conversations_in,
    held_apart,
    workers_of,
)
from fastvlm.functional.errors import InputError
from fastvlm.training.distillation_plan import DistillationPlan
from fastvlm.training.schedule import LearningRate, Schedule, Seed, Steps

if TYPE_CHECKING:
    from fastvlm.data.broken import BrokenRecords
    from fastvlm.data.training_images import ImageReference
    from fastvlm.training.teacher import TeacherImages
    from fastvlm.vision import FastViTHD


WARMUP_DIVISOR = 20
"""The share of a run that warms up is one over this."""


@dataclass(frozen=True, slots=True)
class TeacherOptions:
    """The teacher, and how it takes its images."""

    teacher: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What maps images to features: a file.onnx, a file.pt2 of torch.export, or"
            " module:callable or file.py:callable for what returns a torch module.",
        ),
    ]
    teacher_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=1,
            max=16384,
            help="Side of its images.",
            show_default="what it says itself",
        ),
    ] = None
    teacher_mean: Annotated[
        str | None,
        typer.Option(
            metavar="R,G,B",
            help="What is taken off its pixels, which lie between 0 and 1.",
            show_default="what it says itself",
        ),
    ] = None
    teacher_std: Annotated[
        str | None,
        typer.Option(
            metavar="R,G,B",
            help="What its pixels are then divided by.",
            show_default="what it says itself",
        ),
    ] = None

    def images(self) -> TeacherImages:
        """Return what is said of its images.

        Raises:
            UsageError: It is no three numbers.
        """
        from fastvlm.training.teacher import TeacherImages, three_numbers

        with usage():
            mean, std = (
                None if given is None else three_numbers(option, given)
                for option, given in (
                    ("--teacher-mean", self.teacher_mean),
                    ("--teacher-std", self.teacher_std),
                )
            )
        return TeacherImages(self.teacher_size, mean, std)


@dataclass(frozen=True, slots=True)
class EncoderData:
    """What an encoder learns from."""

    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="What it learns from: a folder of images, a data set whose images are taken, or"
            " scenes:N for rendered scenes. Give it again for several.",
        ),
    ]
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=10**9, help="The most images of each --data."),
    ] = None
    held_out: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=2,
            max=1_000_000,
            help="Images that are kept from it, to measure it by.",
        ),
    ] = 200


@dataclass(frozen=True, slots=True)
class EncoderStart:
    """The encoder to teach."""

    variant: Annotated[
        str | None,
        typer.Option(
            metavar="fastvithd|fastvithd-small",
            help="A new encoder of this size.",
            show_default="fastvithd-small",
        ),
    ] = None
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An encoder to go on from instead, or a model with one."),
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=64,
            max=16384,
            help="Side of its images, a multiple of 64.",
            show_default="the encoder's",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class EncoderRun:
    """How long and how fast it learns, and who is told."""

    output: OutputOption
    steps: Steps = 10_000
    learning_rate: LearningRate = 1e-3
    seed: Seed = 0
    workers: WorkersOption = None
    tracker: TrackerOption = None


def encoder(
    *,
    teacher: TeacherOptions,
    data: EncoderData,
    student: EncoderStart,
    plan: DistillationPlan,
    run: EncoderRun,
    runtime: ModelTrainingRuntime,
    figures: FiguresOutput,
) -> None:
    """Teach a FastViTHD what another network sees in images.

    The encoder learns a teacher's features of random crops, through a linear map that is thrown
    away. It is saved in the form in which it learns, with a model card.
    """
    output = run.output
    check_folder(output)
    stated = teacher.images()
    runtime.prepare()
    import torch

    from fastvlm.data.broken import BrokenRecords
    from fastvlm.training.distillation import distil
    from fastvlm.training.encoder_card import EncoderCard
    from fastvlm.training.processes import this_process
    from fastvlm.training.teacher import load_teacher

    torch.manual_seed(run.seed)
    learner = new_or_read(student)
    loaded = load_teacher(teacher.teacher, stated, this_process().device)
    broken = BrokenRecords()
    found, data_digest = images_of(data.data, learner.config.image_size, broken, data.limit)
    kept, learned = held_apart(found, data.held_out, run.seed, "images")
    schedule = Schedule(
        steps=run.steps,
        learning_rate=run.learning_rate,
        warmup=run.steps // WARMUP_DIVISOR,
        seed=run.seed,
        precision=runtime.mixed_precision,
        trackers=tuple(run.tracker or ()),
        workers=workers_of(run.workers),
    )
    console = figures.console
    console.print(f"{len(learned):,} images. {broken.summary()}.")
    with runtime.progress():
        measures = distil(learner, loaded, learned, kept, schedule, plan, output, data_digest)
    if not this_process().is_main_process:
        return
    start = None if student.start is None else str(student.start)
    card = EncoderCard(teacher.teacher, start, data.data, len(learned), len(kept), plan, schedule)
    card.write(output, learner, measures)
    told = ", ".join(f"{name.removeprefix('held-out ')} {x:.3f}" for name, x in measures.items())
    console.print(f"On {len(kept)} held-out images: {told}; saved in {output}.")
    figures.write({"teacher": teacher.teacher, "images": len(learned), "held_out": measures})


def new_or_read(student: EncoderStart) -> FastViTHD:
    """Return the encoder to teach, for images of the size that was asked for.

    Raises:
        UsageError: Both a variant and a start are given.
        CheckpointError: There is no encoder to go on from.
        InputError: The size is no multiple of 64.
    """
    if student.variant is not None and student.start is not None:
        raise UsageError("Give --variant for a new encoder, or --start for one to go on from.")
    from fastvlm.training.assembly import read_encoder
    from fastvlm.vision import FastViTHD, FastViTHDConfig
    from fastvlm.vision.configuration import REDUCTION

    if student.start is not None:
        learner = read_encoder(student.start).float()
    else:
        with usage():
            config = FastViTHDConfig.variant(student.variant or "fastvithd-small")
        learner = FastViTHD(config)
    size = student.image_size or learner.config.image_size
    if size % REDUCTION:
        raise InputError(f"Images are shown at a multiple of {REDUCTION} pixels; got {size}.")
    learner.config.image_size = size
    return learner


def images_of(
    sources: Sequence[str], size: int, broken: BrokenRecords, limit: int | None
) -> tuple[list[ImageReference], str]:
    """Return the images of data sets, and a digest of these.

    Raises:
        InputError: A source is no data set, has no images, has no limit although it is streamed, or
            too many of its records are broken.
    """
    from fastvlm.data.conversations import Records
    from fastvlm.data.training_images import (
        distinct_images,
        is_image_folder,
        read_image_folder,
        streamed_records,
    )
    from fastvlm.functional.digests import digest
    from fastvlm.training.digests import digest_of_source

    found: list[ImageReference] = []
    digests: list[Any] = [limit]
    for source in sources:
        records = (
            read_image_folder(Path(source))
            if is_image_folder(source)
            else conversations_in(source, size)
        )
        digests.append(digest_of_source(records))
        if not isinstance(records, Records):
            if limit is None:
                raise InputError(f"{source} is streamed: say how much of it to learn with --limit.")
            shown = distinct_images(streamed_records(records, limit), broken, limit)
        else:
            shown = distinct_images(records, broken, limit)
        if not shown:
            raise InputError(f"There is no image in {source}.")
        found += shown
    return found, digest(digests)
