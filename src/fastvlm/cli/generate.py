"""`fastvlm generate`: replies about any images, from any model."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm.cli.files import STANDARD_OUTPUT, FiguresOutput
from fastvlm.cli.loading import DecodingRuntime, ModelOption, SkippedLayersOption, layers_in, usage
from fastvlm.cli.questions import DESCRIPTION_PROMPT, description_prompt
from fastvlm.cli.streams import printable
from fastvlm.cli.terminal import print_aside, print_error
from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    from fastvlm.decoding import Strategy
    from fastvlm.functional.statistics import DecodingStatistics
    from fastvlm.vlm import Reply, ReplyStream, VisionLanguageModel

STRATEGY_NAMES = (
    "autoregressive", "imitation", "cascade", "early-exit", "layer-skip", "prompt-lookup",
)  # fmt: skip


def strategy_names() -> list[str]:
    """Return the completions of `--strategy` in a shell."""
    return list(STRATEGY_NAMES)


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """How drafts are made. None stands for the draft's own setting, or the strategy's default."""

    draft: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The draft's directory: an imitation network made for this model.",
            show_default="the example model's own, for it; else none",
        ),
    ] = None
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How to decode: {', '.join(STRATEGY_NAMES)}. The tokens are the same; the speed"
            " differs.",
            show_default="cascade with a draft, else autoregressive",
            autocompletion=strategy_names,
        ),
    ] = None
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=256,
            help="The most tokens of a draft.",
            show_default="what the draft records, else 24",
        ),
    ] = None
    confidence: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            help="A draft ends after the first token to which the drafter itself gives a smaller"
            " probability; 0 for drafts of fixed length.",
            show_default="what the draft records; else drafts adapt to what is accepted",
        ),
    ] = None
    skipped_layers: SkippedLayersOption = None

    def strategy_of(self, vlm: VisionLanguageModel) -> Strategy:
        """Return the strategy to decode with.

        Raises:
            UsageError: It is unknown, or an option doesn't apply to it or is out of range.
        """
        with usage():
            return vlm.strategy(
                self.strategy,
                num_speculative_tokens=self.num_speculative_tokens,
                confidence=self.confidence,
                skipped_layers=layers_in(self.skipped_layers),
            )


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen and where replies end. None stands for the checkpoint's setting."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=2**31 - 1,
            help="The most tokens of a reply.",
            show_default="the checkpoint's, else 256",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            min=0,
            max=1e6,
            help="Draw tokens at this temperature; 0 for the likeliest.",
            show_default="0",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            help="Draw from the likeliest tokens that together are so probable.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, max=2**64 - 1, help="Draw the same reply each time."),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the reply before this; give it again for more."),
    ] = None

    def given(self) -> dict[str, Any]:
        """Return the options that were given, as `VisionLanguageModel.stream` takes them.

        Raises:
            UsageError: A value is out of range, or needs a temperature.
        """
        from fastvlm.decoding import SamplingParams

        given = {name: value for name, value in asdict(self).items() if value not in (None, [])}
        with usage():
            SamplingParams(**given)
        return given


def generate(
    *,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Images, one reply each.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What is asked of each image.",
            show_default=f"'{DESCRIPTION_PROMPT}'; the example model is asked in its own words",
        ),
    ] = None,
    model: ModelOption = None,
    drafting: DraftOptions,
    sampling: SamplingOptions,
    runtime: DecodingRuntime,
    stats: Annotated[
        bool, typer.Option("--stats", help="Write each reply's timings to standard error.")
    ] = False,
    output: FiguresOutput,
) -> None:
    """Write a reply about each image, as it is decoded.

    An image that can't be read gets a sentence on standard error; the others get their replies,
    and the exit code is 1.
    """
    layers_in(drafting.skipped_layers)
    # What is wrong with an option is said once, before anything is loaded.
    given = sampling.given()
    prompt = prompt or description_prompt(model)
    vlm = runtime.load(model, drafting.draft)
    strategy = drafting.strategy_of(vlm)
    silent = output.json == STANDARD_OUTPUT
    replies: list[dict[str, Any]] = []
    for image in images:
        name = printable(str(image))
        try:
            stream = vlm.stream(prompt, image, strategy=strategy, **given)
            heading = f"{name}: " if len(images) > 1 else ""
            reply = write_reply(stream, heading, silent=silent)
        except InputError as error:
            print_error(str(error))
            replies.append({"image": str(image), "error": str(error)})
            continue
        statistics = stream.request.statistics
        replies.append({"image": str(image), **as_figures(reply, statistics)})
        if stats:
            print_aside(f"{name}: {in_words(statistics)}")
    output.write(
        {"prompt": prompt, "model": model or "the example model", "dtype": runtime.dtype,
         "replies": replies}
    )  # fmt: skip
    if any("error" in reply for reply in replies):
        raise typer.Exit(1)


def write_reply(stream: ReplyStream, heading: str, *, silent: bool = False) -> Reply:
    """Write a reply to standard output as it is decoded, without leading white space.

    Args:
        stream: The reply.
        heading: A text to write before it.
        silent: Whether to write nothing, as standard output is used for something else.

    Raises:
        InputError: The prompt doesn't fit into the model's context; nothing is written then.
    """
    begun = False
    for piece in stream:
        text = piece.text if begun else piece.text.lstrip()
        begun = begun or bool(text)
        if not silent:
            # The first piece is there once the prompt has turned out to be one.
            sys.stdout.write(heading + text)
            sys.stdout.flush()
        heading = ""
    if not silent:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return stream.reply


def as_figures(reply: Reply, statistics: DecodingStatistics) -> dict[str, Any]:
    """Return a reply and its statistics for the JSON output, times in milliseconds."""
    return {
        "text": reply.text.lstrip(),
        "token_ids": list(reply.token_ids),
        "finish_reason": reply.finish_reason,
        "ttft_ms": statistics.ttft_ms,
        "tpot_ms": statistics.tpot_ms,
        "acceptance_length": statistics.acceptance_length if statistics.proposed else None,
        "drafted": statistics.proposed,
        "accepted": statistics.accepted,
    }


def in_words(statistics: DecodingStatistics) -> str:
    """Return a reply's statistics as a line of text."""
    parts = [f"{statistics.tokens} tokens", f"TTFT {statistics.ttft_ms:.1f} ms"]
    if statistics.tpot_ms is not None:
        parts.append(f"TPOT {statistics.tpot_ms:.2f} ms")
    if statistics.proposed:
        parts += [
            f"acceptance length {statistics.acceptance_length:.2f}",
            f"{statistics.accepted} of {statistics.proposed} drafted tokens accepted",
        ]
    return ", ".join(parts)
