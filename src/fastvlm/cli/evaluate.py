"""`fastvlm evaluate`: benchmarks with every strategy, quality and speed in one report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm.cli.contenders import Contenders
from fastvlm.cli.files import FiguresOutput, check_folder
from fastvlm.cli.loading import (
    DecodingRuntime,
    MaxNewTokensOption,
    UsageError,
    usage,
    whole_numbers,
)
from fastvlm.cli.questions import MAX_FAILED, MaxFailedOption
from fastvlm.cli.strategies import LAYER_SKIP, describe
from fastvlm.cli.tables import FigureTable
from fastvlm.cli.terminal import print_error
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import storage_errors

if TYPE_CHECKING:
    from fastvlm.data.tasks import EvaluationTask
    from fastvlm.evaluation.tasks.answers import Journal
    from fastvlm.evaluation.tasks.grades import Graded
    from fastvlm.evaluation.tasks.plan import Plan

KEY = "OPENAI_API_KEY"
"""The environment variable with the judge's key."""


@dataclass(frozen=True, slots=True)
class BenchmarkOptions:
    """Which benchmarks are run, and how they are asked."""

    tasks: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Benchmarks, separated by commas: coco, nocaps, flickr8k, visdial, vqav2, textvqa,"
            " docvqa, mmmu, pope, mmvet, llava-wild. coco and flickr8k have splits: flickr8k:dev.",
        ),
    ]
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="A folder with one for each benchmark, under its name as above, that holds the"
            " files as they were published.",
        ),
    ]
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=10**9,
            help="The most items of each benchmark, spread evenly over it.",
            show_default="all",
        ),
    ] = None
    image_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Show the images in each of these sizes, sides in pixels: 256,512,1024.",
            show_default="the model's own",
        ),
    ] = None
    max_new_tokens: MaxNewTokensOption = 256
    max_failed: MaxFailedOption = MAX_FAILED
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="What to ask of a captioning benchmark's images instead of its usual words, for"
            " a model that learnt others. Give it again for another benchmark.",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class GradingOptions:
    """What grades the benchmarks whose replies are judged."""

    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible endpoint that grades mmvet and llava-wild, such as"
            f" http://localhost:8000/v1; its key is read from {KEY}.",
        ),
    ] = None
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The judge's name at that endpoint.")
    ] = None
    grades: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Grades of mmvet or llava-wild as its publisher's evaluator wrote them, of the"
            " replies in the output's submissions/.",
        ),
    ] = None


def evaluate(
    *,
    benchmarks: BenchmarkOptions,
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where answers and the report go; a stopped run goes on from there.",
        ),
    ],
    contenders: Contenders,
    grading: GradingOptions,
    runtime: DecodingRuntime,
    figures: FiguresOutput,
) -> None:
    """Run benchmarks with every strategy on the same images, and report quality and speed.

    Strategies take turns, an item at a time. The report is report.html, report.md and report.json
    in the output folder; on a finished folder it is written anew.
    """
    if (grading.judge is None) != (grading.judge_model is None):
        raise UsageError("A judge is an address and a name: give both --judge and --judge-model.")
    search = contenders.check()
    sizes = sizes_in(benchmarks.image_sizes)
    prompts, graded_files = pairs(benchmarks.prompt, "--prompt"), pairs(grading.grades, "--grades")
    names = names_in(benchmarks.tasks)
    if unasked := sorted(prompts.keys() - set(names)):
        raise UsageError(f"--prompt names {unasked[0]!r}, which --tasks doesn't.")
    check_folder(output)
    from fastvlm.drafting.fingerprint import weights_hash
    from fastvlm.evaluation.tasks.answers import Journal, left_out, recorded_plan
    from fastvlm.evaluation.tasks.plan import Plan, read_tasks
    from fastvlm.evaluation.tasks.plots import pyplot
    from fastvlm.evaluation.tasks.report import write_report
    from fastvlm.evaluation.tasks.runner import evaluate as run
    from fastvlm.evaluation.tasks.scores import rows
    from fastvlm.evaluation.tasks.tables import lossless, overview, quality

    pyplot()  # what the report needs in the end had better be there at the start
    asked = read_tasks(names, benchmarks.data, benchmarks.limit, prompts)
    check_grades(graded_files, asked)
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    file = output / "answers.jsonl"
    vlm = contenders.load(runtime)
    skipped = contenders.skipped
    if search:
        # A search measures, and finds others another time.
        before = recorded_plan(file).get("strategies", {}).get(LAYER_SKIP, {}).get("skipped_layers")
        items = next(iter(asked.values())).items
        first = ((item.prompt, item.open()) for item in items)
        skipped = tuple(before) if before else contenders.skipped_layers_for(vlm, first)
    measured, chosen = contenders.strategies_of(vlm, skipped), contenders.chosen
    import torch

    plan = Plan(
        model=contenders.model or "the example model",
        tasks=asked,
        strategies={one.name: describe(one, measured[one.name]) for one in chosen},
        sizes=sizes,
        max_new_tokens=benchmarks.max_new_tokens,
        dtype=runtime.dtype,
        threads=torch.get_num_threads(),
        device=runtime.device,
        weights=weights_hash(vlm.model),
    )
    journal = Journal(file, plan)
    with runtime.progress("Answering") as report:
        run(vlm, measured, plan, journal, report, benchmarks.max_failed)
    for failure in journal.failures.values():
        print_error(f"{failure.task}, item {failure.item}, is left out: {failure.reason}")
    plan = left_out(plan, journal)
    graded = all_grades(plan, journal, graded_files, output)
    if grading.judge is not None and grading.judge_model is not None:
        graded |= judged_by(
            grading.judge, grading.judge_model, plan, journal, output / "grades.jsonl", runtime
        )
    found = rows(plan, journal, graded)
    write_report(output, plan, journal, found)
    if figures.json is not None:
        figures.write(json.loads((output / "report.json").read_text(encoding="utf-8")))
    shown = overview(plan, found, quality)
    console = figures.console
    FigureTable(shown.heading, rows=[list(row) for row in shown.rows]).print(console)
    console.print(
        f"\n{lossless(plan, found)}\nThe report is {output / 'report.html'}.", style="dim"
    )


def names_in(tasks: str) -> list[str]:
    """Return the benchmarks of a list as it is typed.

    Raises:
        UsageError: One is none, or there is none.
    """
    from fastvlm.evaluation.tasks.plan import loader_of

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no benchmark.")
    with usage():
        for name in names:
            loader_of(name)
    return names


def sizes_in(listed: str | None) -> list[int | None]:
    """Return the sizes of a list as it is typed: `256,512`.

    Raises:
        UsageError: There is something else than whole numbers in it.
    """
    if listed is None:
        return [None]
    return list(dict.fromkeys(whole_numbers(listed, "--image-sizes", "256,512")))


def pairs(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """Return what an option that is typed `NAME=VALUE` was given, by name.

    Raises:
        UsageError: A name or a value is missing.
    """
    found = {}
    for one in given or ():
        name, _, value = one.partition("=")
        if not name or not value:
            raise UsageError(f"{option} takes NAME=VALUE; got {one!r}.")
        found[name] = value
    return found


def check_grades(files: Mapping[str, str], tasks: Mapping[str, EvaluationTask[Any]]) -> None:
    """Refuse files of grades that could not be read after the long work.

    Raises:
        InputError: One is not there.
        UsageError: Its task is not asked, or not judged.
    """
    for name, file in files.items():
        if name not in tasks or not tasks[name].judged:
            raise UsageError(f"--grades names {name!r}, which is no judged one of these tasks.")
        if not Path(file).is_file():
            raise InputError(f"There is no file of grades at {file}.")


def all_grades(plan: Plan, journal: Journal, files: Mapping[str, str], output: Path) -> Graded:
    """Write what a publisher's evaluator takes, and return the grades that it wrote before.

    Raises:
        InputError: A file is not laid out as published.
    """
    from fastvlm.evaluation.tasks.grades import published, write_submission

    first = next(iter(plan.strategies))
    graded: Graded = {}
    for name, task in plan.tasks.items():
        if task.judged:
            answers = [journal.answers[name, item.id, plan.sizes[0], first] for item in task.items]
            write_submission(output / "submissions", name, task, answers, plan.model)
            if name in files:
                graded |= published(name, task, Path(files[name]), answers)
    return graded


def judged_by(
    url: str, name: str, plan: Plan, journal: Journal, file: Path, runtime: DecodingRuntime
) -> Graded:
    """Return a judge's grades of all replies that are judged.

    Raises:
        InputError: The judge can't be reached, or doesn't answer with grades.
    """
    from fastvlm.evaluation.tasks.grades import judged
    from fastvlm.evaluation.tasks.judge import Judge

    with runtime.progress("Judging") as report:
        grader = Judge(url, name, os.environ.get(KEY))
        return judged(grader, plan.tasks, journal.answers.values(), file, report)
