"""`fastvlm generate`: replies about any images, from any model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from fastvlm.cli.terminal import print_error
from fastvlm.embedded import DESCRIPTION_PROMPT
from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    from fastvlm.functional.statistics import DecodingStatistics
    from fastvlm.vlm import ReplyStream


def generate(  # noqa: PLR0913 (a parameter is an option)
    *,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Images, one reply each.")],
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What is asked of each image.")
    ] = DESCRIPTION_PROMPT,
    model: ModelOption = None,
    draft: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The draft's directory: an imitation network made for this model.",
            show_default="the one that ships, for the model that ships; else none",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="The most tokens of a reply.", show_default="the checkpoint's, else 256"
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How to decode: autoregressive, imitation, early-exit, layer-skip or"
            " prompt-lookup. The tokens are the same; the speed differs.",
            show_default="imitation with a draft, else autoregressive",
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            help="The most tokens of a draft.",
            show_default="what the draft records, else 24; 10 for prompt-lookup",
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="A draft ends after the first token to which the drafter itself gives a smaller"
            " probability; 0 for drafts of fixed length.",
            show_default="what the draft records; else drafts adapt to what is accepted",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="Draw tokens at this temperature; 0 for the likeliest.", show_default="0"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Draw from the likeliest tokens that together are so probable."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the same reply each time.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the reply before this; give it again for more."),
    ] = None,
    skipped_layers: SkippedLayersOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    threads: ThreadsOption = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Write each reply's timings to standard error.")
    ] = False,
) -> None:
    """Write a reply about each image, as it is decoded.

    An image that can't be read gets a sentence on standard error; the others get their replies,
    and the exit code is 1.
    """
    skipped = layers_in(skipped_layers)
    drafting: dict[str, Any] = {
        "num_speculative_tokens": num_speculative_tokens,
        "confidence": confidence,
        "skipped_layers": skipped,
    }
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
    from fastvlm.decoding import SamplingParams

    with usage():
        # What is wrong with an option is said once, before anything is loaded.
        SamplingParams(**sampling)
    vlm = load_quietly(model, draft, threads, dtype, device)
    with usage():
        chosen = vlm.strategy(strategy, **drafting)
    failed = False
    for image in images:
        try:
            stream = vlm.stream(prompt, image, strategy=chosen, **sampling)
            write_reply(stream, f"{image}: " if len(images) > 1 else "")
        except InputError as error:
            print_error(str(error))
            failed = True
        else:
            if stats:
                typer.echo(f"{image}: {in_words(stream.request.statistics)}", err=True)
    if failed:
        raise typer.Exit(1)


def write_reply(stream: ReplyStream, heading: str) -> None:
    """Write a reply to standard output as it is decoded, without white space before it.

    Raises:
        InputError: The prompt doesn't fit into the model's context; then nothing is written.
    """
    begun = False
    for piece in stream:
        # The first piece is there once the prompt has turned out to be one.
        sys.stdout.write(heading)
        heading = ""
        text = piece.text if begun else piece.text.lstrip()
        begun = begun or bool(text)
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def in_words(statistics: DecodingStatistics) -> str:
    """Return a reply's statistics in a line."""
    parts = [f"{statistics.tokens} tokens", f"TTFT {statistics.ttft_ms:.1f} ms"]
    if statistics.tpot_ms is not None:
        parts.append(f"TPOT {statistics.tpot_ms:.2f} ms")
    if statistics.proposed:
        parts += [
            f"acceptance length {statistics.acceptance_length:.2f}",
            f"{statistics.accepted} of {statistics.proposed} drafted tokens accepted",
        ]
    return ", ".join(parts)
