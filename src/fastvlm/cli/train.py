"""`fastvlm train`: the encoder, the model around it, and the draft of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastvlm.cli.loading import ModelOption, ThreadsOption, load_quietly
from fastvlm.functional.errors import InputError

app = typer.Typer(
    rich_markup_mode="markdown",
    no_args_is_help=True,
    help="Train the encoder, then the model around it, then its draft."
    " A run that was stopped goes on from its checkpoint when the same command is given again.",
)

PhotographsOption = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="Captioned photographs in Flickr8k's layout: captions.tsv, train.txt and images/.",
    ),
]
OutputOption = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Where the checkpoint is kept while it runs, and the result in the end."
    ),
]
StepsOption = Annotated[int, typer.Option(min=1, help="Optimiser steps in all.")]
RateOption = Annotated[
    float,
    typer.Option(
        min=1e-8, max=1, help="The peak of the learning rate: warm-up to it, then a cosine down."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Decides every draw of the run.")]
PrecisionOption = Annotated[
    Literal["no", "bf16"] | None,
    typer.Option(help="Mixed precision.", show_default="what accelerate is set to"),
]
AccumulationOption = Annotated[
    int,
    typer.Option(
        min=1, max=4096, help="Slices in which a step is computed: more of them need less memory."
    ),
]
TrackerOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="tensorboard|wandb|trackio",
        help="Where the figures go, besides the log; give it again for several.",
    ),
]


@app.command()
def encoder(  # noqa: PLR0913 (a parameter is an option)
    *,
    photographs: PhotographsOption,
    output: OutputOption,
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An encoder to go on from, or a model with one."),
    ] = None,
    steps: StepsOption = 1150,
    learning_rate: RateOption = 2e-3,
    seed: SeedOption = 0,
    precision: PrecisionOption = None,
    tracker: TrackerOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Teach a FastViTHD the facts of rendered scenes and the words of captions."""
    check_output(output)
    prepare_torch(threads)
    from fastvlm.training.encoder import train_encoder
    from fastvlm.training.schedule import Schedule

    schedule = Schedule(
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        precision=precision,
        trackers=tuple(tracker or ()),
    )
    train_encoder(photographs, output, schedule, start=start)


@app.command()
def model(  # noqa: PLR0913 (a parameter is an option)
    *,
    photographs: PhotographsOption,
    output: OutputOption,
    encoder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What `fastvlm train encoder` made.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A model to go on from, instead of a new one; --encoder then replaces its own.",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="scenes|together|consensus",
            help="A stage to train; give it again for several. All of them, if not given.",
        ),
    ] = None,
    share: Annotated[
        float,
        typer.Option(min=0.01, max=100, help="Steps of each stage, as a share of the plan's."),
    ] = 1.0,
    seed: SeedOption = 0,
    precision: PrecisionOption = None,
    accumulation: AccumulationOption = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute the decoder's layers again on the way back: less memory, more time.",
        ),
    ] = False,
    tracker: TrackerOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Teach a model around a trained encoder to describe scenes and photographs."""
    check_output(output)
    if encoder is None and start is None:
        raise InputError("Give --encoder for a new model, or --start for one to go on from.")
    prepare_torch(threads)
    from fastvlm.training.model import train_model
    from fastvlm.training.stages import STAGES, scaled

    known = [planned.name for planned in STAGES]
    for name in stage or []:
        if name not in known:
            raise InputError(f"The stages are {', '.join(known)}; got --stage {name}.")
    chosen = [planned for planned in STAGES if not stage or planned.name in stage]
    stages = scaled(
        chosen,
        share,
        seed=seed,
        precision=precision,
        accumulation=accumulation,
        trackers=tuple(tracker or ()),
    )
    train_model(
        photographs,
        output,
        encoder=encoder,
        start=start,
        stages=stages,
        gradient_checkpointing=gradient_checkpointing,
    )


@app.command()
def draft(  # noqa: PLR0913 (a parameter is an option)
    *,
    photographs: PhotographsOption,
    output: OutputOption,
    model: ModelOption = None,
    kind: Annotated[
        list[str],
        typer.Option(
            metavar="block|mlp",
            help="What the imitation network is: one decoder layer with its own cache, or the"
            " paper's gated feed-forward network. Give it again to train both side by side.",
        ),
    ] = ["block"],  # noqa: B006 (typer reads it only)
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The output of an earlier run, whose networks go on."),
    ] = None,
    exit_layer: Annotated[
        int, typer.Option(min=1, help="Layers of the model that run before the network.")
    ] = 1,
    draft_vocabulary: Annotated[
        int,
        typer.Option(
            min=1, help="The most tokens that can be drafted: the replies' most frequent."
        ),
    ] = 1024,
    scenes: Annotated[
        int, typer.Option(min=0, help="Rendered scenes whose replies it learns from.")
    ] = 1000,
    photographs_limit: Annotated[
        int, typer.Option(min=0, help="The most photographs whose replies it learns from.")
    ] = 700,
    held_out: Annotated[
        int,
        typer.Option(
            min=0,
            help="Scenes, and photographs after the limit, whose replies are decoded to validate.",
        ),
    ] = 8,
    steps: StepsOption = 400,
    learning_rate: RateOption = 1e-3,
    seed: SeedOption = 0,
    precision: PrecisionOption = None,
    accumulation: AccumulationOption = 1,
    tracker: TrackerOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Teach imitation networks to draft for a frozen model, from the model's own replies.

    The replies are decoded first and kept in the output folder. Each network is saved as a folder
    named after its kind there.
    """
    check_output(output)
    for name in kind:
        if name not in ("block", "mlp"):
            raise InputError(f"An imitation network is a block or an mlp; got --kind {name}.")
    if not scenes and not photographs_limit:
        raise InputError("A draft learns from replies: give --scenes or --photographs-limit.")
    from fastvlm.training.processes import process_0_first, this_process

    vlm = load_quietly(model, threads=threads, device=this_process().device)
    if exit_layer >= vlm.decoder.depth:
        raise InputError(
            f"--exit-layer lies between 1 and {vlm.decoder.depth - 1} for this model;"
            f" got {exit_layer}."
        )
    from fastvlm.data.captioned import read_flickr8k
    from fastvlm.data.questions import HELD_OUT_SCENES, about_photographs, about_scenes
    from fastvlm.training.draft import DraftPlan, train_draft
    from fastvlm.training.replies import own_replies
    from fastvlm.training.schedule import Schedule

    found = read_flickr8k(photographs, "train") if photographs_limit else []
    learnt, others = found[:photographs_limit], found[photographs_limit:][:held_out]
    asked = about_scenes(range(scenes)) + about_photographs(shown.path for shown in learnt)
    unseen = range(HELD_OUT_SCENES, HELD_OUT_SCENES + held_out if scenes else HELD_OUT_SCENES)
    validation = about_scenes(unseen) + about_photographs(shown.path for shown in others)
    with process_0_first():
        dialogues = own_replies(vlm, asked, output)
    schedule = Schedule(
        steps=steps,
        learning_rate=learning_rate,
        warmup=20,
        seed=seed,
        precision=precision,
        accumulation=accumulation,
        trackers=tuple(tracker or ()),
    )
    train_draft(
        vlm,
        {name: DraftPlan(name, exit_layer, draft_vocabulary) for name in kind},
        dialogues,
        output,
        schedule,
        start,
        validation,
    )


def check_output(output: Path) -> None:
    """Refuse an output that can't be a folder.

    Raises:
        InputError: It is a file.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; --output needs a folder.")


def prepare_torch(threads: int | None) -> None:
    """Set the number of threads, and keep `transformers` quiet."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
