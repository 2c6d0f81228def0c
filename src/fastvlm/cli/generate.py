"""`fastvlm generate`: replies about any pictures, from any model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm.cli.loading import ModelOption, ThreadsOption, load_quietly
from fastvlm.cli.terminal import complain
from fastvlm.embedded import DESCRIPTION_PROMPT
from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    from fastvlm.functional.statistics import DecodingStatistics


def generate(  # noqa: PLR0913 (a parameter is an option)
    *,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Pictures, one reply each.")
    ],
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What is asked of each picture.")
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a reply.")] = 256,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How to decode: autoregressive, imitation, early-exit or lookup. The tokens are"
            " the same, only their speed differs.",
            show_default="imitation with a draft, else autoregressive",
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            help="The most tokens of a draft.",
            show_default="what the draft records; 8 for early-exit, 10 for lookup",
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="A draft ends after the first token to which the drafter itself gives a smaller"
            " probability; 0 for drafts of fixed length.",
            show_default="what the draft records; 0 for early-exit",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Draw tokens at this temperature; 0 for the likeliest.")
    ] = 0,
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
    threads: ThreadsOption = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Write each reply's timings to standard error.")
    ] = False,
) -> None:
    """Write a reply about each picture, as it is decoded.

    A picture that can't be read gets a sentence on standard error; the others get their replies,
    and the exit code is 1.
    """
    vlm = load_quietly(model, draft, threads)
    drafter = vlm.drafter(
        strategy, num_speculative_tokens=num_speculative_tokens, confidence=confidence
    )
    from fastvlm.decoding.sampling import SamplingOptions, selection_of
    from fastvlm.vlm import ReplyStream, RequestOptions, among

    options: RequestOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "stop": stop or [],
    }
    if top_p is not None:
        options["top_p"] = top_p
    if seed is not None:
        options["seed"] = seed
    # What is wrong with an option is said once, not once a picture.
    selection_of([], **among(SamplingOptions, options))
    failed = False
    for image in images:
        try:
            request = vlm.request(prompt, image, **options)
        except InputError as error:
            complain(str(error))
            failed = True
            continue
        stream = ReplyStream(vlm, request, drafter)
        if len(images) > 1:
            sys.stdout.write(f"{image}: ")
        begun = False
        for piece in stream:
            text = piece.text if begun else piece.text.lstrip()
            begun = begun or bool(text)
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stats:
            typer.echo(f"{image}: {in_words(stream.reply.statistics)}", err=True)
    if failed:
        raise typer.Exit(1)


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
