"""How the example model was made: its encoder, the model around it, and the drafts.

python recipes/example-model/train.py encoder --photos FLICKR8K --output runs/encoder
python recipes/example-model/train.py model --photos FLICKR8K --encoder runs/encoder --output DIR
python recipes/example-model/train.py questions --photos FLICKR8K --output runs/questions
fastvlm train draft --model DIR --data runs/questions --kind block --kind mlp --output runs/draft
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from fastvlm.cli import run
from fastvlm.cli.command import add_verb, each_of, verbs
from fastvlm.cli.files import check_folder
from fastvlm.cli.loading import UsageError
from fastvlm.cli.training_options import (
    CheckpointingOption,
    ModelTrainingRuntime,
    OutputOption,
    TrackerOption,
)
from fastvlm.training.schedule import LearningRate, Seed, Steps

PhotosOption = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="Captioned photos in Flickr8k's layout: captions.tsv, train.txt and images/.",
    ),
]


def encoder(
    *,
    photos: PhotosOption,
    output: OutputOption,
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An encoder to go on from, or a model with one."),
    ] = None,
    steps: Steps = 1150,
    learning_rate: LearningRate = 2e-3,
    seed: Seed = 0,
    tracker: TrackerOption = None,
    runtime: ModelTrainingRuntime,
) -> None:
    """Teach a FastViTHD the facts of rendered scenes and the words of captions."""
    check_folder(output)
    runtime.prepare()
    from fastvlm.training.schedule import Schedule
    from recipe.encoder import train_encoder

    schedule = Schedule(
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        precision=runtime.mixed_precision,
        trackers=tuple(tracker or ()),
    )
    with runtime.progress():
        train_encoder(photos, output, schedule, start=start)


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What the model is made of."""

    photos: PhotosOption
    encoder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What `train.py encoder` made.")
    ] = None
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A model to go on from, instead of a new one; --encoder then replaces its own.",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class ModelRun:
    """Which stages it learns in, how long and how fast."""

    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="scenes|together|consensus",
            callback=each_of("scenes", "together", "consensus"),
            help="A stage to train; give it again for several. All of them, if not given.",
        ),
    ] = None
    share: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0.01,
            max=100,
            help="Steps of each stage, as a share of the plan's.",
        ),
    ] = 1.0
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=1e-8,
            max=1,
            help="The peak, in every stage.",
            show_default="the stage's",
        ),
    ] = None
    seed: Seed = 0
    accumulation: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=4096,
            help="Slices in which a step is computed, in every stage: more of them need less"
            " memory.",
            show_default="the stage's",
        ),
    ] = None
    tune_encoder: Annotated[
        bool,
        typer.Option(
            "--tune-encoder",
            help="Teach the encoder too; for a model of --start, whose decoder can read it.",
        ),
    ] = False
    gradient_checkpointing: CheckpointingOption = False
    tracker: TrackerOption = None


def model(
    *,
    parts: ModelParts,
    output: OutputOption,
    run: ModelRun,
    runtime: ModelTrainingRuntime,
) -> None:
    """Teach a model around a trained encoder to describe scenes and photos."""
    check_folder(output)
    if parts.encoder is None and parts.start is None:
        raise UsageError("Give --encoder for a new model, or --start for one to go on from.")
    if parts.start is None and run.tune_encoder:
        raise UsageError("--tune-encoder needs a model that has learnt to read it: give --start.")
    runtime.prepare()
    from recipe.model import train_model
    from recipe.stages import STAGES, scaled

    chosen = [planned for planned in STAGES if not run.stage or planned.name in run.stage]
    chosen = [replace(planned, tunes_encoder=run.tune_encoder) for planned in chosen]
    given = {"learning_rate": run.learning_rate, "accumulation": run.accumulation}
    stages = scaled(
        chosen,
        run.share,
        seed=run.seed,
        precision=runtime.mixed_precision,
        trackers=tuple(run.tracker or ()),
        **{name: value for name, value in given.items() if value is not None},
    )
    with runtime.progress():
        train_model(
            parts.photos,
            output,
            encoder=parts.encoder,
            start=parts.start,
            stages=stages,
            gradient_checkpointing=run.gradient_checkpointing,
        )


def grow(
    *,
    model: Annotated[Path, typer.Option(metavar="DIR", help="The model.")],
    draft: Annotated[Path, typer.Option(metavar="DIR", help="Its draft.")],
    output: OutputOption,
    widen: Annotated[
        int, typer.Option(metavar="N", min=1, max=16, help="How many times as wide it becomes.")
    ] = 1,
    layers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=1024, help="How deep it becomes.", show_default="as it is"
        ),
    ] = None,
) -> None:
    """Make a model's decoder and its draft larger; nothing is trained, and both compute the same.

    They are saved as OUTPUT/model and OUTPUT/draft.
    """
    check_folder(output)
    from recipe.growth import Size, grow_both

    grow_both(model, draft, output, Size(widen, layers))


def questions(
    *,
    photos: PhotosOption,
    output: OutputOption,
    number: Annotated[
        int, typer.Option(metavar="N", min=1, max=10**7, help="Questions about photos.")
    ] = 2400,
    scenes: Annotated[
        int, typer.Option(metavar="N", min=0, max=10**7, help="Questions about scenes.")
    ] = 400,
    image_size: Annotated[
        int, typer.Option(metavar="PX", min=64, max=4096, help="Side of the scenes' images.")
    ] = 192,
    seed: Seed = 0,
) -> None:
    """Write questions in many wordings, for `fastvlm train draft --data OUTPUT` to be asked."""
    check_folder(output)
    from recipe.questions import write_questions

    write_questions(photos, output, number=number, scenes=scenes, size=image_size, seed=seed)


app = verbs("Make the example model: its encoder, the model around it, and what drafts are asked.")
for verb in (encoder, model, grow, questions):
    add_verb(app, verb)

if __name__ == "__main__":
    sys.exit(run(app=app))
