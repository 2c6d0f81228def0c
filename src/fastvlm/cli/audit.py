"""`fastvlm audit`: every strategy's tokens against ordinary decoding, over a whole data set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm.cli.contenders import Contenders
from fastvlm.cli.files import FiguresOutput, check_folder
from fastvlm.cli.loading import (
    DecodingRuntime,
    ReplyOptions,
)
from fastvlm.cli.questions import SCENES, FailedQuestions, QuestionOptions
from fastvlm.cli.tables import FigureTable
from fastvlm.cli.terminal import number
from fastvlm.example import example
from fastvlm.functional.files import write_json

if TYPE_CHECKING:
    from fastvlm.evaluation.audit import Audit


@dataclass(frozen=True, slots=True)
class AuditReplyOptions(ReplyOptions):
    """How an audit's replies are decoded."""

    batch: Annotated[
        int, typer.Option(metavar="N", min=1, max=4096, help="Questions decoded together.")
    ] = 50


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """What replies are held against, and what counts as a difference."""

    gap: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1e6,
            help="A difference is a tie where the target's two best tokens, in float64, lie closer"
            " than this.",
            show_default="1e-4 in float32, 0.25 in bfloat16, 0 with --wide",
        ),
    ] = None
    wide: Annotated[
        bool,
        typer.Option(
            "--wide",
            help="Compare with our own ordinary decoding, its passes as wide as those that verify,"
            " one question at a time: in any precision not a token may then differ.",
        ),
    ] = False


def audit(
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where the replies and the findings go; a stopped audit goes on from there.",
        ),
    ],
    *,
    contenders: Contenders,
    asked: QuestionOptions,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=1_000_000, help="The most images.")
    ] = 1000,
    replies: AuditReplyOptions,
    comparison: ComparisonOptions,
    runtime: DecodingRuntime,
    figures: FiguresOutput,
) -> None:
    """Say whether every strategy's tokens are those of transformers' own greedy generate.

    With --temperature they are held against our own ordinary decoding of the same seeds. A
    difference is a tie where rounding alone decides, see --gap. Exits with 1 if any reply differs
    otherwise, or a question failed.
    """
    params = replies.params()
    contenders.check()  # whatever is skipped, the tokens are the same: nothing is searched for
    asked.check()
    check_folder(output)
    from fastvlm.evaluation.audit import audit as compare

    vlm = contenders.load(runtime, max_slots=replies.batch)
    images = asked.chosen_images(contenders.model, vlm)
    questions = asked.questions(contenders.model, images, limit)
    failed = FailedQuestions(len(questions), asked.max_failed)
    audited = contenders.strategies_of(vlm, contenders.skipped)
    with runtime.progress("Auditing") as report:
        found = compare(
            vlm,
            audited,
            questions,
            output / "audit.jsonl",
            params=params,
            wide=comparison.wide,
            progress=report,
            failed=failed,
        )
    if comparison.gap is not None:
        found = replace(found, gap=comparison.gap)
    record = {
        "images": images,
        "prompts": list(dict.fromkeys(question.prompt for question in questions)),
        "temperature": replies.temperature,
        "seed": (replies.seed or 0) if replies.temperature else None,
        "dtype": runtime.dtype,
        "wide": comparison.wide,
        "gap": found.gap,
        "strategies": found.to_json(),
        "failed": failed.found,
    }
    write_json(output / "audit.json", record)
    figures.write(record)
    console = figures.console
    table(found).print(console)
    if images == SCENES:
        texts = [
            str(vlm.tokenizer.decode(reply, skip_special_tokens=True))
            for reply in found.replies.values()
        ]
        seeds = [questions[number].image for number in found.replies]
        scores = example().scenes.score_all(seeds, texts)
        write_json(output / "facts.json", scores)
        console.print(
            f"{scores['accuracy']:.1%} of the facts of {scores['scenes']} scenes are right;"
            f" {scores['exact_descriptions']} descriptions are exact."
        )
    if any(row["different"] for row in found.to_json().values()):
        raise typer.Exit(1)
    failed.exit()


def table(found: Audit) -> FigureTable:
    """Return what was found, a strategy a row."""
    out = FigureTable(
        ("strategy", "replies", "identical", "ties", "different", "acceptance length")
    )
    for name, row in found.to_json().items():
        counts = (str(row[column]) for column in ("replies", "identical", "ties", "different"))
        out.add(name, *counts, number(row["acceptance_length"], 2))
    return out
