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
from fastvlm.cli.files import check_writable
from fastvlm.cli.loading import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    SkippedLayersOption,
    ThreadsOption,
    UsageError,
    layers_in,
    load_quietly,
)
from fastvlm.cli.strategies import (
    SEARCHED,
    DraftsOption,
    StrategiesOption,
    chosen_strategies,
    describe,
    named_drafts,
    named_strategies,
    needs_search,
)
from fastvlm.cli.terminal import hardware_line, number, print_error, progress
from fastvlm.cli.ttft import ttft
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import write_json
from fastvlm.functional.text_files import read_text

if TYPE_CHECKING:
    from fastvlm.data.questions import Question
    from fastvlm.evaluation.benchmark import StrategyResult
    from fastvlm.functional.statistics import Spread

SCENES, NO_IMAGES = "scenes", "none"
ImagesOption = Annotated[
    str,
    typer.Option(
        metavar="scenes|none|DIR",
        help="Rendered scenes that no training has seen, a folder of photographs, or none for a"
        " model that reads text alone.",
    ),
]
PromptsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="What is asked of each image. Give it again for several.",
        show_default=f"'{embedded.SCENE_PROMPT}' or '{embedded.DESCRIPTION_PROMPT}'",
    ),
]
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
    images: ImagesOption = SCENES,
    prompt: PromptsOption = None,
    listing: ListingOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The most images to measure with.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="The most tokens of a reply.")] = 160,
    skipped_layers: SkippedLayersOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
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
    """Measure decoding strategies on the same images, interleaved in one run.

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
    search = needs_search(chosen, skipped)
    questions, broken = readable_questions(images, prompt, limit, listing)
    from fastvlm.evaluation.benchmark import measure
    from fastvlm.evaluation.measuring import hardware
    from fastvlm.evaluation.reference import image_of

    # The drafts are loaded one by one below, each under its own name.
    where = embedded.MODEL if model is None else model
    vlm = load_quietly(where, threads=threads, dtype=dtype, device=device)
    if search:
        searched = questions[:SEARCHED]
        skipped = vlm.find_skipped_layers(
            [question.prompt for question in searched],
            [image_of(vlm, question) for question in searched],
        ).skipped
    measured = named_strategies(vlm, chosen, drafts, skipped)
    with progress("Measuring") as report:
        results = measure(vlm, measured, questions, max_new_tokens=max_new_tokens, progress=report)
    machine = hardware(vlm.decoder.device)
    if json_file is not None:
        write_json(
            json_file,
            {
                "hardware": machine,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "model": model or "the one that ships",
                "strategies": {one.name: describe(one, measured[one.name]) for one in chosen},
                "dtype": dtype,
                "images": images,
                "prompts": list(dict.fromkeys(question.prompt for question in questions)),
                "limit": limit,
                "max_new_tokens": max_new_tokens,
                "results": [result.to_json() for result in results],
            },
        )
    console = Console(highlight=False)
    console.print()
    console.print(table(results, console.width))
    console.print()
    what = {SCENES: "scenes", NO_IMAGES: "prompts"}.get(images, "photographs")
    console.print(
        f"{len(questions)} {'questions about ' * (len(prompt or ()) > 1)}{what}, replies of"
        f" {results[0].tokens:.0f} tokens (median), on {hardware_line(machine)}.",
        style="dim",
    )
    if broken:
        raise typer.Exit(1)


def readable_questions(
    images: str, prompts: Sequence[str] | None, limit: int, listing: Path | None = None
) -> tuple[list[Question], bool]:
    """Return the questions, and whether an image was left out because it can't be read.

    Raises:
        InputError: There is no such folder or listing, or no image there that can be read.
        UsageError: A listing is given where there is no folder, or there is nothing to ask.
    """
    from fastvlm.data.questions import HELD_OUT_SCENES, Question, pictures_in

    if listing is not None and images in (SCENES, NO_IMAGES):
        raise UsageError(f"--listing names photographs; --images {images} has none.")
    if images == NO_IMAGES:
        if not prompts:
            raise UsageError("--images none needs a --prompt.")
        return [Question(prompt, None) for prompt in prompts[:limit]], False
    if images == SCENES:
        scenes = range(HELD_OUT_SCENES, HELD_OUT_SCENES + limit)
        asked = prompts or [embedded.SCENE_PROMPT]
        return [Question(prompt, scene) for scene in scenes for prompt in asked], False
    from fastvlm.vision.loading import load_image

    if listing is None:
        found = pictures_in(Path(images), limit)
    else:
        if not listing.is_file():
            raise InputError(f"There is no list of photographs at {listing}.")
        found = [Path(images) / name for name in read_text(listing).split()]
        found = found[:limit]
    read: list[Path] = []
    for path in found:
        try:
            load_image(path)
        except InputError as error:
            print_error(str(error))
        else:
            read.append(path)
    if not read:
        raise InputError(f"No image in {images} can be read.")
    asked = prompts or [embedded.DESCRIPTION_PROMPT]
    questions = [Question(prompt, str(path)) for path in read for prompt in asked]
    return questions, len(read) < len(found)


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
