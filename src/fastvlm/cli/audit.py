"""`fastvlm audit`: every strategy's tokens against `transformers`' own, over a whole data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastvlm import embedded
from fastvlm.cli.benchmark import SCENES, ListingOption, readable_questions
from fastvlm.cli.files import write_json
from fastvlm.cli.loading import DtypeOption, ModelOption, ThreadsOption, load_quietly
from fastvlm.cli.strategies import (
    DraftsOption,
    StrategiesOption,
    chosen_strategies,
    named_drafters,
    named_drafts,
)
from fastvlm.cli.terminal import number, progress


def audit(  # noqa: PLR0913 (a parameter is an option)
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where the replies and the findings go; a stopped audit goes on from there.",
        ),
    ],
    *,
    model: ModelOption = None,
    draft: DraftsOption = None,
    strategies: StrategiesOption = None,
    pictures: Annotated[
        str, typer.Option(metavar="scenes|DIR", help="Unseen scenes, or a folder of photographs.")
    ] = SCENES,
    listing: ListingOption = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is asked of each picture.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most pictures.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Pictures decoded together.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="The most tokens of a reply.")] = 160,
    dtype: DtypeOption = "float32",
    gap: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="A difference is a tie where the target's two best logits, in float64, lie closer"
            " than this.",
            show_default="1e-4 in float32, 0.25 in bfloat16, 0 with --wide",
        ),
    ] = None,
    wide: Annotated[
        bool,
        typer.Option(
            "--wide",
            help="Compare with our own ordinary decoding, its passes as wide as those that verify,"
            " one picture at a time: in any precision not a token may then differ.",
        ),
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Say whether every strategy's tokens are those of transformers' own greedy generate.

    A difference is a tie where rounding alone decides, see --gap. Exits with 1 if any reply differs
    otherwise.
    """
    drafts = named_drafts(draft, model)
    chosen = chosen_strategies(strategies, drafts)
    questions, _ = readable_questions(pictures, prompt, limit, listing)
    output.mkdir(parents=True, exist_ok=True)
    from fastvlm.evaluation.audit import audit as compare

    where = embedded.MODEL if model is None else model
    vlm = load_quietly(where, threads=threads, dtype=dtype)
    drafters = named_drafters(vlm, chosen, drafts)
    with progress("Auditing") as report:
        found = compare(
            vlm,
            drafters,
            questions,
            output / "audit.jsonl",
            batch=batch,
            max_new_tokens=max_new_tokens,
            wide=wide,
            progress=report,
        )
    if gap is not None:
        found = replace(found, gap=gap)
    write_json(
        output / "audit.json",
        {
            "pictures": pictures,
            "prompt": questions[0].prompt,
            "dtype": dtype,
            "wide": wide,
            "gap": found.gap,
            "strategies": found.to_json(),
        },
    )
    out = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("strategy", "replies", "identical", "ties", "different", "accept.\nlength"):
        out.add_column(name, justify="left" if name == "strategy" else "right")
    for name, row in found.to_json().items():
        out.add_row(
            name,
            *(str(row[column]) for column in ("replies", "identical", "ties", "different")),
            number(row["acceptance_length"], 2),
        )
    console = Console(highlight=False)
    console.print(out)
    if pictures == SCENES:
        from fastvlm.evaluation.quality import score_scenes

        texts = [str(vlm.tokenizer.decode(r, skip_special_tokens=True)) for r in found.replies]
        scores = score_scenes(questions, texts)
        write_json(output / "facts.json", scores)
        console.print(
            f"{scores['accuracy']:.1%} of the facts of {scores['scenes']} scenes are right;"
            f" {scores['exact_descriptions']} descriptions are exact."
        )
    if any(row["different"] for row in found.to_json().values()):
        raise typer.Exit(1)
