"""`fastvlm train draft`: imitation networks for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastvlm.cli.command import each_of
from fastvlm.cli.files import FiguresOutput, check_folder
from fastvlm.cli.loading import (
    MaxNewTokensOption,
    ModelOption,
    UsageError,
    load_quietly,
    usage,
)
from fastvlm.cli.terminal import PlainConsole, hardware_line
from fastvlm.cli.training_options import (
    OutputOption,
    TrackerOption,
    TrainingRuntime,
    WorkersOption,
    conversations_in,
    held_apart,
    workers_of,
)
from fastvlm.functional.errors import InputError
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.schedule import Schedule

if TYPE_CHECKING:
    from fastvlm.data.broken import BrokenRecords
    from fastvlm.training.replies import Example, TrainingPrompt
    from fastvlm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class DraftData:
    """What a draft learns from, and whose replies."""

    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="What it learns from: a folder, file, shards or hub data set of conversations or"
            " captions, or scenes:N for rendered scenes. Give it again for several.",
        ),
    ]
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Ask this of each image, not what the data asks; not of scenes. Give it again"
            " for several.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=10**9, help="The most questions of each --data."),
    ] = None
    replies: Annotated[
        Literal["own", "data"], typer.Option(help="Learn the model's own replies, or the data's.")
    ] = "own"
    temperature: Annotated[
        list[float],
        typer.Option(
            metavar="T",
            min=0,
            max=1e6,
            help="Of the model's own replies; 0 for greedy ones. Give it again to have each"
            " question answered at several.",
        ),
    ] = field(default_factory=lambda: [0.0])
    max_new_tokens: MaxNewTokensOption = 160
    model: ModelOption = None
    held_out: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1_000_000,
            help="Questions that are kept from it, to measure it by decoding.",
        ),
    ] = 8


@dataclass(frozen=True, slots=True)
class Networks:
    """Which networks are trained side by side, and what they start from."""

    kind: Annotated[
        list[str],
        typer.Option(
            metavar="block|mlp",
            callback=each_of("block", "mlp"),
            help="What the imitation network is: decoder layers with their own cache, or the"
            " paper's gated feed-forward network. Give it again to train both side by side.",
        ),
    ] = field(default_factory=lambda: ["block"])
    exit_layer: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Layers of the model that run before the network; auto teaches a few for a short"
            " while and takes the one that decodes fastest here.",
        ),
    ] = "1"
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The output of an earlier run, whose networks go on."),
    ] = None


@dataclass(frozen=True, slots=True)
class JointOptions:
    """Whether and how the model is fine-tuned beforehand."""

    phases: Annotated[
        Literal["frozen", "joint,frozen"],
        typer.Option(help="Whether the model is fine-tuned on the data's replies beforehand."),
    ] = "frozen"
    exit_weight: Annotated[
        float,
        typer.Option(
            metavar="X", min=0, max=1e6, help="Weight of the exit's loss in the joint phase."
        ),
    ] = 1.0
    joint_steps: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=2**31 - 1, help="Steps of the joint phase."),
    ] = 400
    joint_learning_rate: Annotated[
        float,
        typer.Option(metavar="X", min=1e-8, max=1, help="The peak of the joint phase."),
    ] = 2e-5


@dataclass(frozen=True, slots=True)
class DraftRun:
    """Where a run keeps what it makes, who prepares its data, and who is told its figures."""

    output: OutputOption
    workers: WorkersOption = None
    tracker: TrackerOption = None


DRAFT_SCHEDULE = Schedule(steps=400, learning_rate=1e-3, warmup=20)


def draft(
    *,
    questions: DraftData,
    networks: Networks,
    plan: DraftPlan,
    joint_phase: JointOptions,
    schedule: Schedule = DRAFT_SCHEDULE,
    run: DraftRun,
    runtime: TrainingRuntime,
    figures: FiguresOutput,
) -> None:
    """Teach imitation networks to draft for a model.

    The model stays as it is, but with --phases joint,frozen: then it is fine-tuned first, with the
    loss of the exit beside its own, and saved as the folder `model` in the output.

    The model's own replies are decoded first and kept in the output folder. Each network is saved
    as a folder named after its kind there, with a model card.
    """
    output, model = run.output, questions.model
    check_folder(output)
    check_temperature(questions.temperature, questions.replies)
    joint = joint_phase.phases == "joint,frozen"
    if joint:
        check_joint(networks.exit_layer, questions.prompt, runtime.target_dtype)
    from fastvlm.training.processes import process_0_first, this_process

    runtime.prepare()
    vlm = load_quietly(model, dtype=runtime.target_dtype, device=this_process().device)
    check_exit_layer(networks.exit_layer, vlm.decoder.depth)
    from fastvlm.data.broken import BrokenRecords
    from fastvlm.evaluation.measuring import hardware
    from fastvlm.training.draft import train_draft
    from fastvlm.training.held_out import decode_held_out
    from fastvlm.training.joint import JointPlan, train_joint
    from fastvlm.training.model_card import Card
    from fastvlm.training.replies import data_replies, own_replies

    broken, unread = BrokenRecords(), BrokenRecords()
    asked = questions_in(questions.data, vlm, broken, questions.prompt or [], questions.limit)
    kept, learned = held_apart(asked, questions.held_out, schedule.seed, "questions")
    schedule = replace(
        schedule,
        precision=runtime.mixed_precision,
        trackers=tuple(run.tracker or ()),
        workers=workers_of(run.workers),
    )
    console = figures.console
    target = str(model or "fastvlm's own model")
    if joint:
        tuned = output / "model"
        slower = replace(
            schedule, steps=joint_phase.joint_steps, learning_rate=joint_phase.joint_learning_rate
        )
        exit_plan = JointPlan(int(networks.exit_layer), joint_phase.exit_weight)
        with runtime.progress():
            train_joint(vlm, data_replies(vlm, learned), exit_plan, slower, tuned)
        vlm, target = load_quietly(tuned, device=this_process().device), str(tuned)
        console.print(
            f"The target, fine-tuned with exit {networks.exit_layer}, is saved in {tuned}."
        )
    if questions.replies == "data":
        examples = data_replies(vlm, learned)
    else:
        with process_0_first(), runtime.progress():
            examples = [
                example
                for temperature in questions.temperature
                for example in own_replies(
                    vlm,
                    learned,
                    output,
                    unread,
                    max_new_tokens=questions.max_new_tokens,
                    temperature=temperature,
                )
            ]
    console.print(f"{len(examples):,} replies. {broken.summary()}.")
    if unread.count:
        console.print(f"{unread.summary()}.")
    plans = {
        name: replace(plan, kind=name, exit_layer=int(networks.exit_layer))
        if networks.exit_layer != "auto"
        else best_plan(vlm, replace(plan, kind=name), examples, kept, output, schedule, console)
        for name in networks.kind
    }
    with runtime.progress():
        trained = train_draft(vlm, plans, examples, output, schedule, networks.start, kept)
    if not this_process().is_main_process:
        return
    for name, decoded in (found := decode_held_out(vlm, trained, kept)).items():
        whose = "the data set's" if questions.replies == "data" else "the model's own"
        card = Card(
            target,
            questions.data,
            whose,
            plans[name],
            questions.held_out,
            hardware_line(hardware(vlm.decoder.device)),
        )
        card.write(output / name, trained[name], decoded)
        console.print(
            f"{name}: acceptance rate {decoded.acceptance_rate:.3f},"
            f" {decoded.acceptance_length:.2f} tokens a pass, {decoded.speedup.median:.2f}x on"
            f" {questions.held_out} held-out questions; saved in {output / name}."
        )
    figures.write({"target": target, "drafts": {name: asdict(one) for name, one in found.items()}})


def check_temperature(temperatures: Sequence[float], replies: str) -> None:
    """Refuse temperatures at which nothing can be drawn, or nothing is.

    Raises:
        UsageError: It is one.
    """
    if any(temperatures) and replies == "data":
        raise UsageError("The data's replies are not drawn: leave out --temperature.")
    from fastvlm.decoding import SamplingParams

    with usage():
        for temperature in temperatures:
            SamplingParams(temperature)


def check_joint(exit_layer: str, prompts: Sequence[str] | None, dtype: str) -> None:
    """Refuse options that leave the joint phase without an exit, replies or exact weights.

    Raises:
        UsageError: They do.
    """
    if exit_layer == "auto" or prompts:
        raise UsageError(
            "The joint phase learns the data's replies and needs an exit: give --exit-layer a"
            " number, and no --prompt."
        )
    if dtype != "float32":
        raise UsageError("The joint phase trains the model itself, which needs --dtype float32.")


def check_exit_layer(exit_layer: str, depth: int) -> None:
    """Refuse an exit layer that a decoder doesn't have.

    Raises:
        UsageError: It is neither auto nor a layer before the last.
    """
    if exit_layer != "auto" and not (exit_layer.isdecimal() and 1 <= int(exit_layer) < depth):
        raise UsageError(
            f"--exit-layer is auto or lies between 1 and {depth - 1} for this model; got"
            f" {exit_layer}."
        )


def best_plan(
    vlm: VisionLanguageModel,
    plan: DraftPlan,
    examples: Sequence[Example],
    kept: Sequence[TrainingPrompt],
    output: Path,
    schedule: Schedule,
    console: PlainConsole,
) -> DraftPlan:
    """Return a plan with the exit layer that decodes fastest, and say how each one did."""
    from fastvlm.training.exit_choice import choose_exit_layer

    short = replace(schedule, steps=max(1, schedule.steps // 5), warmup=10)
    tries = output / f"exits-{plan.kind}"
    best, found = choose_exit_layer(vlm, plan, examples, kept, tries, short)
    for layer, decoded in found.items():
        console.print(
            f"{plan.kind}, exit layer {layer}: {decoded.acceptance_length:.2f} tokens a pass,"
            f" {decoded.tokens_per_second:.0f} tokens/s{' (taken)' * (layer == best)}"
        )
    return replace(plan, exit_layer=best)


def questions_in(
    sources: Sequence[str],
    vlm: VisionLanguageModel,
    broken: BrokenRecords,
    prompts: Sequence[str],
    limit: int | None,
) -> list[TrainingPrompt]:
    """Return the questions of data sets.

    Raises:
        InputError: A source is no data set, has no limit although it is streamed, or too many of
            its records are broken.
    """
    from fastvlm.data.conversations import Records
    from fastvlm.prompts import FastViTHDPromptBuilder
    from fastvlm.training.replies import questions_of

    size = vlm.image_size if isinstance(vlm.prompts, FastViTHDPromptBuilder) else None
    asked = []
    for source in sources:
        found = conversations_in(source, size)
        if isinstance(found, Records):
            # A scene is asked for its exact description, whatever else is asked.
            own = () if source.startswith("scenes:") else prompts
            asked += questions_of(found, broken, prompts=own, limit=limit)
            continue
        if limit is None:
            raise InputError(f"{source} is streamed: say how much of it to learn with --limit.")
        streamed = (record for shard in range(len(found)) for record in found.read(shard, 0))
        asked += questions_of(streamed, broken, prompts=prompts, limit=limit)
    return asked
