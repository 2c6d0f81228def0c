"""`fastvlm train`: the encoder, the model around it, and the draft of a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fastvlm.cli.loading import ModelOption, ThreadsOption, load_quietly
from fastvlm.cli.terminal import hardware_line
from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    from fastvlm.data.broken import BrokenRecords
    from fastvlm.training.replies import Asked
    from fastvlm.vlm import VisionLanguageModel

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


@app.command()
def encoder(
    photographs: PhotographsOption,
    output: OutputOption,
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An encoder to go on from, or a model with one."),
    ] = None,
    steps: StepsOption = 1150,
    learning_rate: RateOption = 2e-3,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Teach a FastViTHD the facts of rendered scenes and the words of captions."""
    check_output(output)
    prepare_torch(threads)
    from fastvlm.training.encoder import train_encoder
    from fastvlm.training.loop import Schedule

    schedule = Schedule(steps=steps, learning_rate=learning_rate, seed=seed)
    train_encoder(photographs, output, schedule, start=start)


@app.command()
def model(
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
    threads: ThreadsOption = None,
) -> None:
    """Teach a model around a trained encoder to describe scenes and photographs."""
    check_output(output)
    if encoder is None and start is None:
        raise InputError("Give --encoder for a new model, or --start for one to go on from.")
    prepare_torch(threads)
    from fastvlm.training.model import STAGES, scaled, train_model

    known = [planned.name for planned in STAGES]
    for name in stage or []:
        if name not in known:
            raise InputError(f"The stages are {', '.join(known)}; got --stage {name}.")
    chosen = [planned for planned in STAGES if not stage or planned.name in stage]
    train_model(
        photographs, output, encoder=encoder, start=start, stages=scaled(chosen, share, seed)
    )


@app.command()
def draft(  # noqa: PLR0913 (a parameter is an option)
    *,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="What it learns from: a folder, file, shards or hub data set of conversations or"
            " captions, or scenes:N for rendered scenes. Give it again for several.",
        ),
    ],
    output: OutputOption,
    model: ModelOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Ask this of each picture, not what the data asks; not of scenes. Give it again"
            " for several.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The most questions of each --data.")
    ] = None,
    replies: Annotated[
        Literal["own", "data"], typer.Option(help="Learn the model's own replies, or the data's.")
    ] = "own",
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the model's own replies; 0 for greedy ones.")
    ] = 0.0,
    kind: Annotated[
        list[str],
        typer.Option(
            metavar="block|mlp",
            help="What the imitation network is: decoder layers with their own cache, or the"
            " paper's gated feed-forward network. Give it again to train both side by side.",
        ),
    ] = ["block"],  # noqa: B006 (typer reads it only)
    exit_layer: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Layers of the model that run before the network; auto teaches a few for a short"
            " while and takes the one that decodes fastest here.",
        ),
    ] = "1",
    blocks: Annotated[int, typer.Option(min=1, help="Decoder layers of a block.")] = 1,
    draft_vocabulary: Annotated[
        int,
        typer.Option(
            min=0, help="The most tokens that can be drafted, the replies' most frequent; 0: all."
        ),
    ] = 1024,
    random_start: Annotated[
        bool,
        typer.Option(
            "--random-start", help="Start at random, not as the layers that it stands for."
        ),
    ] = False,
    cosine: Annotated[float, typer.Option(min=0, help="Weight of 1 - cos in the loss.")] = 0.1,
    cross_entropy: Annotated[
        float, typer.Option(min=0, help="Weight of the cross-entropy in the loss.")
    ] = 0.1,
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The output of an earlier run, whose networks go on."),
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(min=1, help="Questions that are kept from it, to measure it by decoding."),
    ] = 8,
    steps: StepsOption = 400,
    learning_rate: RateOption = 1e-3,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Teach imitation networks to draft for a frozen model.

    The model's own replies are decoded first and kept in the output folder. Each network is saved
    as a folder named after its kind there, with a model card.
    """
    check_output(output)
    for name in kind:
        if name not in ("block", "mlp"):
            raise InputError(f"An imitation network is a block or an mlp; got --kind {name}.")
    if temperature and replies == "data":
        raise InputError("The data's replies are not drawn: leave out --temperature.")
    vlm = load_quietly(model, threads=threads)
    depth = vlm.decoder.depth
    if exit_layer != "auto" and not (exit_layer.isdecimal() and 1 <= int(exit_layer) < depth):
        raise InputError(
            f"--exit-layer is auto or lies between 1 and {depth - 1} for this model; got"
            f" {exit_layer}."
        )
    from fastvlm.data.broken import BrokenRecords
    from fastvlm.evaluation.measuring import hardware
    from fastvlm.training.draft import DraftPlan, train_draft
    from fastvlm.training.exit_choice import choose_exit_layer
    from fastvlm.training.held_out import decode_held_out
    from fastvlm.training.loop import Schedule
    from fastvlm.training.model_card import Card
    from fastvlm.training.replies import data_replies, own_replies

    broken, unread = BrokenRecords(), BrokenRecords()
    asked = questions_in(data, vlm, broken, prompt or [], limit)
    if len(asked) <= held_out:
        raise InputError(
            f"There are {len(asked)} questions, and {held_out} are held out: none is left to learn"
            " from. Give more --data, or a smaller --held-out."
        )
    random.Random(seed).shuffle(asked)
    kept, learnt = asked[:held_out], asked[held_out:]
    examples = (
        data_replies(vlm, learnt)
        if replies == "data"
        else own_replies(vlm, learnt, output, unread, temperature=temperature)
    )
    usual = DraftPlan(
        blocks=blocks,
        draft_vocabulary=draft_vocabulary or None,
        initialised=not random_start,
        cosine=cosine,
        cross_entropy=cross_entropy,
    )
    schedule = Schedule(steps=steps, learning_rate=learning_rate, warmup=20, seed=seed)
    console = Console(highlight=False)
    console.print(f"{len(examples):,} replies. {broken.summary()}.")
    if unread.count:
        console.print(f"{unread.summary()}.")
    plans = {}
    for name in kind:
        plan = replace(usual, kind=name, exit_layer=1 if exit_layer == "auto" else int(exit_layer))
        if exit_layer == "auto":
            short = replace(schedule, steps=max(1, steps // 5), warmup=10)
            tries = output / f"exits-{name}"
            best, found = choose_exit_layer(vlm, plan, examples, kept, tries, short)
            plan = replace(plan, exit_layer=best)
            for layer, decoded in found.items():
                console.print(
                    f"{name}, exit layer {layer}: {decoded.acceptance_length:.2f} tokens a pass,"
                    f" {decoded.tokens_per_second:.0f} tokens/s{' (taken)' * (layer == best)}"
                )
        plans[name] = plan
    networks = train_draft(vlm, plans, examples, output, schedule, start)
    for name, decoded in decode_held_out(vlm, networks, kept).items():
        where = hardware_line(hardware())
        whose = "the data set's" if replies == "data" else "the model's own"
        card = Card(str(model or "fastvlm's own model"), data, whose, plans[name], held_out, where)
        card.write(output / name, networks[name], decoded)
        console.print(
            f"{name}: acceptance rate {decoded.acceptance_rate:.3f},"
            f" {decoded.acceptance_length:.2f} tokens a pass, {decoded.speedup.median:.2f}x on"
            f" {held_out} held-out questions; saved in {output / name}."
        )


def questions_in(
    sources: Sequence[str],
    vlm: VisionLanguageModel,
    broken: BrokenRecords,
    prompts: Sequence[str],
    limit: int | None,
) -> list[Asked]:
    """Return the questions of data sets.

    Raises:
        InputError: A source is no data set, has no limit although it is streamed, or too many of
            its records are broken.
    """
    from fastvlm.data.conversations import Records
    from fastvlm.data.questions import scene_conversations
    from fastvlm.data.reading import read_conversations
    from fastvlm.training.replies import questions_of

    asked = []
    for source in sources:
        name, _, number = source.partition(":")
        if name == "scenes" and number.isdecimal():
            scenes = scene_conversations(range(int(number)), vlm.image_size)
            asked += questions_of(scenes, broken, limit=limit)
            continue
        found = read_conversations(source)
        if isinstance(found, Records):
            asked += questions_of(found, broken, prompts=prompts, limit=limit)
            continue
        if limit is None:
            raise InputError(f"{source} is streamed: say how much of it to learn with --limit.")
        streamed = (record for shard in range(len(found)) for record in found.read(shard, 0))
        asked += questions_of(streamed, broken, prompts=prompts, limit=limit)
    return asked


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
