"""`fastvlm demo`: the example model on its own images."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fastvlm.cli.files import FiguresOutput
from fastvlm.cli.loading import DecodingRuntime
from fastvlm.cli.streaming import ReplyWriter, in_colour, thumbnail
from fastvlm.cli.tables import FigureTable
from fastvlm.cli.terminal import hardware_line, number
from fastvlm.example import example
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.functional.text_files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastvlm.data.questions import Question
    from fastvlm.decoding import Strategy
    from fastvlm.functional.statistics import DecodingStatistics
    from fastvlm.vlm import VisionLanguageModel

DRAFTED_STYLE, FULL_MODEL_STYLE = "green", "bold"
"""The styles of drafted and accepted tokens, and of the full model's own."""

MAX_NEW_TOKENS = 160
SCENE_KIND, PHOTO_KIND = "scene", "photo"
"""Kinds of images."""
MIN_SIDE_BY_SIDE_CELLS = 60
"""Minimum console width for an image beside its title; it is above it otherwise."""


@dataclass(frozen=True, slots=True)
class DemoImage:
    """An image of the example model.

    Args:
        file: The image's file.
        kind: `scene` or `photo`.
        title: The title.
        credit: Author, source and licence, if they are to be shown.
    """

    file: Path
    kind: str
    title: str
    credit: str | None

    @property
    def question(self) -> Question:
        """The question that the model is asked about it."""
        from fastvlm.data.questions import Question

        shipped = example()
        prompt = shipped.SCENE_PROMPT if self.kind == SCENE_KIND else shipped.DESCRIPTION_PROMPT
        return Question(prompt, str(self.file))


@dataclass(frozen=True, slots=True)
class DemoResult:
    """One image's reply decoded both ways."""

    title: str
    identical: bool
    ordinary: DecodingStatistics
    speculative: DecodingStatistics

    @property
    def speedup(self) -> float | None:
        """Time per output token of ordinary decoding over that of self-speculative decoding."""
        if not self.ordinary.tpot_ms or not self.speculative.tpot_ms:
            return None
        return self.ordinary.tpot_ms / self.speculative.tpot_ms


def demo(
    images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1_000_000,
            help="How many images to show.",
            show_default="all of the example model",
        ),
    ] = None,
    *,
    runtime: DecodingRuntime,
    output: FiguresOutput,
) -> None:
    """See the example model describe images, ordinarily and self-speculatively.

    Tokens that were drafted and accepted have one colour, those that the full model gave another.

    With --json it only measures: the hardware, and under `results` an object for each way of
    decoding.
    """
    shown = read_images(example().IMAGES)[:images]
    vlm = runtime.load(None)
    strategies = {name: vlm.strategy(name) for name in ("autoregressive", "cascade")}
    if output.json is None:
        show(output.console, vlm, strategies, shown)
        return
    from fastvlm.decoding import SamplingParams
    from fastvlm.evaluation.benchmark import measure
    from fastvlm.evaluation.measuring import hardware

    with runtime.progress("Measuring") as report:
        found = measure(
            vlm,
            strategies,
            [image.question for image in shown],
            params=SamplingParams(max_new_tokens=MAX_NEW_TOKENS),
            progress=report,
        )
    output.write(
        {
            "hardware": hardware(vlm.decoder.device, vlm.decoder.runtime),
            "dtype": runtime.dtype,
            "results": [result.to_json() for result in found.results],
        }
    )


def read_images(folder: Path) -> list[DemoImage]:
    """Return the images listed in a folder's `images.json`.

    Raises:
        CheckpointError: The list is missing, broken or empty.
    """
    listing = folder / "images.json"
    if not listing.is_file():
        raise CheckpointError(f"The demo's images are missing: there is no {listing}.")
    try:
        rows = read_json(listing)
        found = [
            DemoImage(folder / row["file"], row["kind"], row["title"], _credit(row)) for row in rows
        ]
    except (InputError, TypeError, KeyError) as error:
        raise CheckpointError(f"{listing} can't be read: {error!r}.") from error
    for image in found:
        if image.kind not in (SCENE_KIND, PHOTO_KIND):
            raise CheckpointError(f"{listing} has an image of unknown kind {image.kind!r}.")
    if not found:
        raise CheckpointError(f"{listing} lists no image.")
    return found


def _credit(row: dict[str, Any]) -> str | None:
    """Return who made an image, under which licence and where it is from, if that is told."""
    return ", ".join(row[key] for key in ("credit", "licence", "source") if row.get(key)) or None


def show(
    console: Console,
    vlm: VisionLanguageModel,
    strategies: dict[str, Strategy],
    images: Sequence[DemoImage],
) -> None:
    """Show every image with its reply decoded both ways, then a table of all results.

    Args:
        console: Where to write.
        vlm: The example model.
        strategies: `autoregressive` and `cascade`, by name.
        images: The images to describe.
    """
    from fastvlm.evaluation.measuring import hardware

    legend = Text("Each reply is decoded twice, ordinarily and self-speculatively")
    if console.is_terminal and console.color_system and not console.no_color:
        legend += Text.assemble(
            ": ",
            ("these tokens were drafted and accepted", DRAFTED_STYLE),
            ", ",
            ("these the full model gave itself", FULL_MODEL_STYLE),
        )
    console.print(legend + Text("."))
    compared = []
    for place, image in enumerate(images, 1):
        console.print()
        introduce(console, image, f"{place}/{len(images)}")
        console.print()
        comparison = compare(console, vlm, strategies, image)
        compared.append(comparison)
        console.print(line(comparison))
    console.print()
    table(compared).print(console)
    console.print()
    console.print(
        f"Measured on {hardware_line(hardware(vlm.decoder.device, vlm.decoder.runtime))}.",
        style="dim",
    )
    console.print(
        "Each reply is decoded once more for its times, without being shown: TTFT is the time to"
        " the first token, image included; TPOT the time per output token after it; the"
        " acceptance length is tokens per pass of the full model.",
        style="dim",
    )


def introduce(console: Console, image: DemoImage, place: str) -> None:
    """Show an image beside its title, prompt and credit.

    Args:
        console: Where to write.
        image: The image.
        place: Its number among all images, such as "1/6".
    """
    from fastvlm.vision.loading import load_image

    said = Text.assemble((f"{place}  {image.title}", "bold"), "\n")
    said.append(f"Prompt: {image.question.prompt}")
    if image.credit:
        said.append(f"\n{image.kind.capitalize()}: {image.credit}", "dim")
    opened = load_image(image.file)
    if not in_colour(console):
        console.print(said)
        return
    if console.width < MIN_SIDE_BY_SIDE_CELLS:
        console.print(thumbnail(opened), said, sep="\n")
        return
    beside = Table.grid(padding=(0, 2))
    beside.add_row(thumbnail(opened), said)
    console.print(beside)


def compare(
    console: Console,
    vlm: VisionLanguageModel,
    strategies: dict[str, Strategy],
    image: DemoImage,
) -> DemoResult:
    """Stream the reply to an image both ways, then measure both without writing to the terminal.

    Args:
        console: Where to write.
        vlm: The example model.
        strategies: `autoregressive` and `cascade`, by name.
        image: The image to describe.
    """
    from fastvlm.decoding import SamplingParams
    from fastvlm.evaluation.benchmark import run_strategy

    question, replies = image.question, []
    for title, name in (("Ordinary", "autoregressive"), ("Self-speculative", "cascade")):
        console.print(Text(f"  {title}", "bold underline"))
        writer = ReplyWriter(console)
        stream = vlm.stream(
            question.prompt,
            image.file,
            max_new_tokens=MAX_NEW_TOKENS,
            strategy=strategies[name],
        )
        for piece in stream:
            writer.write(piece.text, DRAFTED_STYLE if all(piece.drafted) else FULL_MODEL_STYLE)
        writer.close()
        replies.append(tuple(stream.reply.token_ids))
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    runs = [
        run_strategy(vlm, strategies[name], question, params)
        for name in ("autoregressive", "cascade")
    ]
    replies += [run.token_ids for run in runs]
    return DemoResult(image.title, len(set(replies)) == 1, runs[0].statistics, runs[1].statistics)


def line(of: DemoResult) -> Padding:
    """Return the figures of one image's reply, decoded both ways, as a line."""
    text = Text()
    text.append("identical" if of.identical else "different", "" if of.identical else "bold red")
    text.append(
        f": TTFT {number(of.ordinary.ttft_ms)} and {number(of.speculative.ttft_ms)} ms,"
        f" TPOT {number(of.ordinary.tpot_ms, 2)} and {number(of.speculative.tpot_ms, 2)} ms,"
        f" acceptance length {number(of.speculative.acceptance_length, 2)}, speedup "
    )
    text.append(number(of.speedup, 2, "x"), "bold")
    return Padding.indent(text, 2)


def table(compared: Sequence[DemoResult]) -> FigureTable:
    """Return the summary of all images: medians, and the acceptance length over all tokens."""
    out = FigureTable(
        (
            "image",
            "identical",
            "decoding",
            "TTFT, ms",
            "TPOT, ms",
            "acceptance length",
            "speedup",
        ),
        texts=("identical", "decoding"),
    )
    for of in compared:
        _add(
            out,
            [of.title, "yes" if of.identical else "no"],
            [of.ordinary.ttft_ms, of.speculative.ttft_ms],
            [of.ordinary.tpot_ms, of.speculative.tpot_ms],
            [of.speculative.acceptance_length, of.speedup],
        )
    if len(compared) > 1:
        cycles = sum(of.speculative.cycles for of in compared)
        after_first = sum(of.speculative.tokens - 1 for of in compared)
        out.end_section()
        _add(
            out,
            ["median", f"{sum(of.identical for of in compared)} of {len(compared)}"],
            [
                _median([of.ordinary.ttft_ms for of in compared]),
                _median([of.speculative.ttft_ms for of in compared]),
            ],
            [
                _median([of.ordinary.tpot_ms for of in compared]),
                _median([of.speculative.tpot_ms for of in compared]),
            ],
            [after_first / cycles if cycles else None, _median([of.speedup for of in compared])],
        )
    return out


def _add(
    out: FigureTable,
    names: list[str],
    ttft: list[float | None],
    tpot: list[float | None],
    gain: list[float | None],
) -> None:
    """Add a row of two lines: the ordinary figures, and the self-speculative ones below."""
    out.add(
        *names,
        "ordinary\nspeculative",
        "\n".join(number(value) for value in ttft),
        "\n".join(number(value, 2) for value in tpot),
        f"\n{number(gain[0], 2)}",
        f"\n{number(gain[1], 2, 'x')}",
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
