"""`fastvlm benchmark`: strategies against each other and against `transformers`' generate."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm.cli.contenders import Contenders
from fastvlm.cli.files import FiguresOutput
from fastvlm.cli.loading import DecodingRuntime, ReplyOptions
from fastvlm.cli.questions import WORDS, FailedQuestions, QuestionOptions
from fastvlm.cli.strategies import describe
from fastvlm.cli.tables import FigureTable
from fastvlm.cli.terminal import hardware_line, number

if TYPE_CHECKING:
    from fastvlm.evaluation.benchmark import StrategyResult
    from fastvlm.functional.statistics import Spread


def benchmark(
    *,
    contenders: Contenders,
    asked: QuestionOptions,
    limit: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=1_000_000, help="The most images to measure with."),
    ] = 50,
    replies: ReplyOptions,
    runtime: DecodingRuntime,
    output: FiguresOutput,
) -> None:
    """Measure decoding strategies on the same images, interleaved in one run.

    The table has medians, with quartiles for the speedup, which compares times per output token
    with autoregressive decoding. A reply is identical if its tokens are those of transformers' own
    greedy generate; with --temperature, those of autoregressive decoding of the same seed.
    """
    params = replies.params()
    contenders.check()
    asked.check()
    from fastvlm.evaluation.benchmark import measure
    from fastvlm.evaluation.measuring import hardware
    from fastvlm.evaluation.reference import image_of
    from fastvlm.evaluation.roofline import measure_machine, pass_costs, shares, to_json

    vlm = contenders.load(runtime)
    images = asked.chosen_images(contenders.model, vlm)
    questions = asked.questions(contenders.model, images, limit)
    failed = FailedQuestions(len(questions), asked.max_failed)
    questions = failed.readable(questions)
    skipped = contenders.skipped_layers_for(
        vlm, ((question.prompt, image_of(vlm, question)) for question in questions)
    )
    measured = contenders.strategies_of(vlm, skipped)
    with runtime.progress("Measuring") as report:
        found = measure(
            vlm,
            measured,
            questions,
            params=params,
            progress=report,
            failed=failed,
        )
    results = found.results
    machine = hardware(vlm.decoder.device, vlm.decoder.runtime)
    limits = measure_machine(vlm.decoder.device, vlm.decoder.dtype)
    costs = pass_costs(vlm.decoder, measured, results, limits)
    reached = shares(costs, results)
    prompts = list(dict.fromkeys(question.prompt for question in questions))
    output.write(
        {
            "hardware": machine,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": contenders.model or "the example model",
            "strategies": {
                one.name: describe(one, measured[one.name]) for one in contenders.chosen
            },
            "dtype": runtime.dtype,
            "images": images,
            "prompts": prompts,
            "limit": limit,
            "max_new_tokens": replies.max_new_tokens,
            "temperature": replies.temperature,
            "seed": (replies.seed or 0) if replies.temperature else None,
            "failed": failed.found,
            "roofline": to_json(limits, costs, reached),
            "results": [result.to_json() for result in results],
            "kinds": {
                kind: [result.to_json() for result in of_kind]
                for kind, of_kind in found.kinds.items()
            },
        }
    )
    console = output.console
    console.print()
    table(results).print(console)
    console.print()
    for kind, of_kind in found.kinds.items():
        console.print(f"Of the kind {kind}:")
        table(of_kind).print(console)
        console.print()
    measured_replies = results[0].replies
    about = f"questions about {len(questions) // len(prompts)} " if len(prompts) > 1 else ""
    words = WORDS.get(images, "images")
    words = words.removesuffix("s") if measured_replies == 1 else words
    console.print(
        f"Reading weights at {limits.bytes_per_second / 1e9:.0f} GB/s, a token takes at least "
        + ", ".join(f"{one.limit_ms:.2f} ms ({name})" for name, one in reached.items())
        + ".",
        style="dim",
    )
    console.print(
        f"{measured_replies} {about}{words}, replies of"
        f" {results[0].tokens:.0f} tokens (median), on {hardware_line(machine)}.",
        style="dim",
    )
    failed.exit()


def table(results: Sequence[StrategyResult]) -> FigureTable:
    """Return the results, a strategy a row."""
    out = FigureTable(
        (
            "strategy",
            "identical",
            "speedup and its quartiles",
            "against transformers",
            "acceptance length",
            "acceptance rate",
            "draft length",
            "TTFT, ms",
            "TPOT, ms",
        ),
        texts=("identical",),
    )
    for result in results:
        rate = result.acceptance_rate
        out.add(
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
