"""`fastvlm benchmark`: strategies against each other and against `transformers`' generate."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastvlm import embedded
from fastvlm.cli.files import check_writable, write_json
from fastvlm.cli.loading import (
    ModelOption,
    SkippedLayersOption,
    ThreadsOption,
    layers_in,
    load_quietly,
)
from fastvlm.cli.strategies import (
    SEARCHED,
    DraftsOption,
    StrategiesOption,
    chosen_strategies,
    describe,
    named_drafters,
    named_drafts,
    needs_search,
)
from fastvlm.cli.terminal import complain, hardware_line, number, progress
from fastvlm.cli.ttft import ttft
from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    from fastvlm.data.questions import Question
    from fastvlm.evaluation.benchmark import StrategyResult
    from fastvlm.functional.statistics import Spread

SCENES = "scenes"
ListingOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file with the names of the photographs to take, one a line.",
        show_default="all of the folder",
    ),
]
WIDE = 100
"""Cells from which a terminal has room between the columns."""


app = typer.Typer(
    rich_markup_mode="markdown",
    help="Measure decoding strategies; with `ttft`, the time to first token.",
)
app.command("ttft")(ttft)


@app.callback(invoke_without_command=True)
def benchmark(  # noqa: PLR0913 (a parameter is an option)
    context: typer.Context,
    *,
    model: ModelOption = None,
    draft: DraftsOption = None,
    strategies: StrategiesOption = None,
    pictures: Annotated[
        str,
        typer.Option(
            metavar="scenes|DIR",
            help="Rendered scenes that no training has seen, or a folder of photographs.",
        ),
    ] = SCENES,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What is asked of each picture.",
            show_default=f"'{embedded.SCENE_PROMPT}' or '{embedded.DESCRIPTION_PROMPT}'",
        ),
    ] = None,
    listing: ListingOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The most pictures to measure with.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="The most tokens of a reply.")] = 160,
    skipped_layers: SkippedLayersOption = None,
    threads: ThreadsOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the figures to this file too (times in milliseconds).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure decoding strategies on the same pictures, interleaved in one run.

    The table has medians, with quartiles for the speedup, which compares times per output token
    with autoregressive decoding. A reply is identical if its tokens are those of transformers' own
    greedy generate.
    """
    if context.invoked_subcommand is not None:
        return
    if json_file is not None:
        check_writable(json_file)
    drafts = named_drafts(draft, model)
    skipped = layers_in(skipped_layers)
    chosen = chosen_strategies(strategies, drafts)
    questions, broken = readable_questions(pictures, prompt, limit, listing)
    from fastvlm.evaluation.benchmark import measure
    from fastvlm.evaluation.measuring import hardware

    # The drafts are loaded one by one below, each under its own name.
    vlm = load_quietly(embedded.MODEL if model is None else model, threads=threads)
    if needs_search(chosen, skipped):
        searched = questions[:SEARCHED]
        skipped = vlm.find_skipped_layers(
            [question.prompt for question in searched],
            [question.open(vlm.image_size) for question in searched],
        ).skipped
    drafters = named_drafters(vlm, chosen, drafts, skipped)
    with progress("Measuring") as report:
        results = measure(vlm, drafters, questions, max_new_tokens=max_new_tokens, progress=report)
    machine = hardware()
    if json_file is not None:
        write_json(
            json_file,
            {
                "hardware": machine,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "model": model or "the one that ships",
                "strategies": {one.name: describe(one, drafters[one.name]) for one in chosen},
                "pictures": pictures,
                "prompt": questions[0].prompt,
                "limit": limit,
                "max_new_tokens": max_new_tokens,
                "results": [result.to_json() for result in results],
            },
        )
    console = Console(highlight=False)
    console.print()
    console.print(table(results, console.width))
    console.print()
    console.print(
        f"{len(questions)} {'scenes' if pictures == SCENES else 'photographs'}, replies of"
        f" {results[0].tokens:.0f} tokens (median), on {hardware_line(machine)}.",
        style="dim",
    )
    if broken:
        raise typer.Exit(1)


def readable_questions(
    pictures: str, prompt: str | None, limit: int, listing: Path | None = None
) -> tuple[list[Question], bool]:
    """Return the questions, and whether a picture was left out because it can't be read.

    Raises:
        InputError: There is no such folder or listing, or no picture there that can be read.
    """
    from fastvlm.data.questions import HELD_OUT_SCENES, Question, pictures_in

    if pictures == SCENES:
        if listing is not None:
            raise InputError("--listing names photographs; --pictures scenes has none.")
        asked = prompt or embedded.SCENE_PROMPT
        return [Question(asked, HELD_OUT_SCENES + index) for index in range(limit)], False
    from fastvlm.vision.pictures import open_picture

    if listing is None:
        found = pictures_in(Path(pictures), limit)
    else:
        if not listing.is_file():
            raise InputError(f"There is no list of photographs at {listing}.")
        found = [Path(pictures) / name for name in listing.read_text(encoding="utf-8").split()]
        found = found[:limit]
    questions = []
    for path in found:
        try:
            open_picture(path)
        except InputError as error:
            complain(str(error))
        else:
            questions.append(Question(prompt or embedded.DESCRIPTION_PROMPT, str(path)))
    if not questions:
        raise InputError(f"No picture in {pictures} can be read.")
    return questions, len(questions) < len(found)


def table(results: Sequence[StrategyResult], width: int) -> Table:
    """Return the results, a strategy a row, for a terminal of a width in cells."""
    out = Table(box=SIMPLE_HEAD, padding=(0, int(width >= WIDE)), pad_edge=False, show_edge=False)
    out.add_column("strategy", no_wrap=True)
    out.add_column("identical")
    for name in (
        "speedup\nand its\nquartiles",
        "against\ntrans-\nformers",
        "accept.\nlength",
        "accept.\nrate",
        "draft\nlength",
        "TTFT,\nms",
        "TPOT,\nms",
    ):
        out.add_column(name, justify="right")
    for result in results:
        rate = result.acceptance_rate
        out.add_row(
            result.strategy,
            identity(result),
            _times(result.speedup, quartiles=True),
            _times(result.speedup_vs_transformers),
            number(result.acceptance_length if rate is not None else None, 2),
            "-" if rate is None else f"{rate:.0%}",
            number(result.draft_length),
            number(result.ttft_ms.median),
            number(None if result.tpot_ms is None else result.tpot_ms.median, 2),
        )
    return out


def identity(result: StrategyResult) -> str:
    """Return whether a strategy's replies are those of `transformers`, and how many are not."""
    ties = f"{result.ties} {'tie' if result.ties == 1 else 'ties'}"
    if result.identical:
        return f"yes, {ties}" if result.ties else "yes"
    differ = f"no: {result.different} of {result.replies}"
    return f"{differ}, {ties}" if result.ties else differ


def _times(spread: Spread | None, *, quartiles: bool = False) -> str:
    if spread is None:
        return "-"
    median = f"{spread.median:.2f}x"
    return f"{median}\n{spread.low:.2f}-{spread.high:.2f}" if quartiles else median
