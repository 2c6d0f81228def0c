"""`fastvlm audit`: every strategy's tokens against ordinary decoding, over a whole data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastvlm import embedded
from fastvlm.cli.benchmark import (
    SCENES,
    ImagesOption,
    ListingOption,
    PromptsOption,
    readable_questions,
)
from fastvlm.cli.loading import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    SkippedLayersOption,
    ThreadsOption,
    layers_in,
    load_quietly,
    usage,
)
from fastvlm.cli.strategies import (
    DraftsOption,
    StrategiesOption,
    chosen_strategies,
    named_drafts,
    named_strategies,
    needs_search,
)
from fastvlm.cli.terminal import number, progress
from fastvlm.functional.files import write_json


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
    images: ImagesOption = SCENES,
    prompt: PromptsOption = None,
    listing: ListingOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The most images.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Questions decoded together.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="The most tokens of a reply.")] = 160,
    temperature: Annotated[
        float, typer.Option(min=0, help="Draw replies at this temperature; 0 for greedy ones.")
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Reply i is drawn with the seed + i.", show_default="0"),
    ] = None,
    skipped_layers: SkippedLayersOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    gap: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="A difference is a tie where the target's two best tokens, in float64, lie closer"
            " than this.",
            show_default="1e-4 in float32, 0.25 in bfloat16, 0 with --wide",
        ),
    ] = None,
    wide: Annotated[
        bool,
        typer.Option(
            "--wide",
            help="Compare with our own ordinary decoding, its passes as wide as those that verify,"
            " one question at a time: in any precision not a token may then differ.",
        ),
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Say whether every strategy's tokens are those of transformers' own greedy generate.

    With --temperature they are held against our own ordinary decoding of the same seeds. A
    difference is a tie where rounding alone decides, see --gap. Exits with 1 if any reply differs
    otherwise.
    """
    from fastvlm.decoding import SamplingParams

    with usage():
        params = SamplingParams(temperature, seed=seed, max_new_tokens=max_new_tokens)
    drafts = named_drafts(draft, model)
    skipped = layers_in(skipped_layers)
    chosen = chosen_strategies(strategies, drafts)
    needs_search(chosen, skipped)  # whatever is skipped, the tokens are the same
    questions, _ = readable_questions(images, prompt, limit, listing)
    output.mkdir(parents=True, exist_ok=True)
    from fastvlm.evaluation.audit import audit as compare

    where = embedded.MODEL if model is None else model
    vlm = load_quietly(where, threads=threads, dtype=dtype, device=device, max_slots=batch)
    audited = named_strategies(vlm, chosen, drafts, skipped)
    with progress("Auditing") as report:
        found = compare(
            vlm,
            audited,
            questions,
            output / "audit.jsonl",
            params=params,
            batch=batch,
            wide=wide,
            progress=report,
        )
    if gap is not None:
        found = replace(found, gap=gap)
    write_json(
        output / "audit.json",
        {
            "images": images,
            "prompts": list(dict.fromkeys(question.prompt for question in questions)),
            "temperature": temperature,
            "seed": (seed or 0) if temperature else None,
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
    if images == SCENES:
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
