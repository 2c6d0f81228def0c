"""Strategies measured against each other and against `transformers`, interleaved in one run."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, cast

import torch
from transformers.generation.streamers import BaseStreamer

from fastvlm.data.questions import Question
from fastvlm.decoding import SamplingParams, Strategy
from fastvlm.decoding.options import SAMPLING_OPTION_NAMES
from fastvlm.evaluation.measuring import (
    DEFAULT_SAMPLING_PARAMS,
    no_progress,
    refuse,
    rotated,
    run_request,
    speedup,
)
from fastvlm.evaluation.reference import (
    MAX_TIE_GAPS,
    ExactModel,
    best_gap,
    dialogue_of,
    generate_greedily,
)
from fastvlm.functional.errors import InputError
from fastvlm.functional.statistics import Acceptance, DecodingStatistics, Spread
from fastvlm.vlm import VisionLanguageModel

TRANSFORMERS = "transformers"
AUTOREGRESSIVE = "autoregressive"


@dataclass(frozen=True, slots=True)
class MeasuredReply:
    """One strategy's reply to one question.

    Args:
        token_ids: The tokens, the end token included.
        statistics: Timings and acceptance.
    """

    token_ids: tuple[int, ...]
    statistics: DecodingStatistics


class Verdict(Enum):
    """How a reply compares with the reference's to the same question."""

    IDENTICAL = "identical"
    TIE = "tie"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """One strategy's result over all questions.

    Args:
        strategy: The strategy's name.
        replies: The number of questions measured.
        tokens: Median number of tokens in a reply.
        identical: Whether every reply has the same tokens as `transformers`' own `generate`, or,
            when sampling, as ordinary decoding of the same seed, and where a decoder has weights of
            its own (`SplitDecoder.bits`), as its ordinary decoding; but for the `ties`.
        different: The number of replies that differ, ties included.
        ties: The number of replies whose first difference is where the gap between the two best
            logits is below `MAX_TIE_GAPS`.
        speedup: Autoregressive time per output token over this strategy's: median over the
            questions, with quartiles.
        speedup_end_to_end: The same for whole replies, image and prefill included.
        speedup_vs_transformers: As `speedup`, against `transformers`' own `generate`.
        acceptance_length: Tokens per pass of the full model, over all replies.
        acceptance_rate: Accepted tokens per drafted token, over all replies.
        draft_length: Drafted tokens per cycle, over all replies.
        ttft_ms: Time to first token, in milliseconds.
        tpot_ms: Time per output token after the first, in milliseconds.
    """

    strategy: str
    replies: int
    tokens: float
    identical: bool
    different: int
    ties: int
    speedup: Spread | None
    speedup_end_to_end: Spread | None
    speedup_vs_transformers: Spread | None
    acceptance_length: float | None
    acceptance_rate: float | None
    draft_length: float | None
    ttft_ms: Spread
    tpot_ms: Spread | None

    def to_json(self) -> dict[str, Any]:
        """Return the medians under the fields' names, and the quartiles under `<name>_iqr`."""
        out: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Spread):
                out[name], out[f"{name}_iqr"] = value.median, [value.low, value.high]
            else:
                out[name] = value
        return out


class TokenTimes(BaseStreamer):
    """A streamer that records when `transformers`' `generate` produces each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Record a token's time; the first call has the prompt."""
        del value
        if self.prompt_seen:
            self.times.append(time.perf_counter())
        self.prompt_seen = True

    def end(self) -> None:
        """Do nothing."""


def run_transformers(
    vlm: VisionLanguageModel, question: Question, max_new_tokens: int
) -> MeasuredReply:
    """Return the reply of `transformers`' own greedy `generate` to a question.

    Args:
        vlm: The model.
        question: The question.
        max_new_tokens: The maximum number of tokens in the reply.
    """
    messages = dialogue_of(vlm, question)
    started = time.perf_counter()
    inputs = vlm.prompts.inputs(messages)
    clock = TokenTimes()
    [reply] = generate_greedily(vlm, inputs, max_new_tokens, clock)
    return MeasuredReply(tuple(reply), DecodingStatistics.of(started, clock.times, [], []))


def run_strategy(
    vlm: VisionLanguageModel, strategy: Strategy, question: Question, params: SamplingParams
) -> MeasuredReply:
    """Return a strategy's reply to a question.

    Args:
        vlm: The model.
        strategy: The strategy.
        question: The question.
        params: How tokens are chosen.

    Raises:
        InputError: The image can't be read, or the prompt doesn't fit into the model's context.
    """
    request = run_request(vlm, strategy, dialogue_of(vlm, question), **options_of(params))
    return MeasuredReply(tuple(request.output_token_ids), request.statistics)


def options_of(params: SamplingParams) -> dict[str, Any]:
    """Return the options of a request, see `VisionLanguageModel.request`."""
    return {name: getattr(params, name) for name in SAMPLING_OPTION_NAMES}


@dataclass(frozen=True, slots=True)
class Measured:
    """What a benchmark found.

    Args:
        results: Each contender's result over all questions.
        kinds: The same over the questions of each kind, where they have kinds.
    """

    results: list[StrategyResult]
    kinds: dict[str, list[StrategyResult]]


def measure(
    vlm: VisionLanguageModel,
    strategies: Mapping[str, Strategy],
    questions: Sequence[Question],
    *,
    params: SamplingParams = DEFAULT_SAMPLING_PARAMS,
    progress: Callable[[int, int], None] = no_progress,
    failed: Callable[[Question, InputError], None] = refuse,
) -> Measured:
    """Measure strategies, and `transformers`' `generate`, on the same questions.

    Every contender answers a question before the next question begins, in an order that rotates, so
    that changes of the machine's speed affect all contenders alike. The first question is answered
    once beforehand without being measured. `generate` has no part in sampled replies, as its draws
    are others.

    Args:
        vlm: The model.
        strategies: The strategies by name, with `autoregressive`, the baseline of speedup.
        questions: At least one question.
        params: How tokens are chosen; question i has the seed + i.
        progress: Called with the questions done and their total.
        failed: Called with a question that can't be asked and the reason; unless it raises, the
            question is left out for every contender.

    Raises:
        InputError: Raised by `failed`, or no question could be asked.
    """
    if params.max_new_tokens is None:
        params = replace(params, max_new_tokens=DEFAULT_SAMPLING_PARAMS.max_new_tokens)
    if params.temperature and params.seed is None:
        params = replace(params, seed=0)
    limit = cast(int, params.max_new_tokens)
    contenders: dict[str, Callable[[Question, SamplingParams], MeasuredReply]] = {}
    if not params.temperature:
        contenders[TRANSFORMERS] = lambda question, _: run_transformers(vlm, question, limit)
    for name, strategy in strategies.items():
        contenders[name] = partial(run_strategy, vlm, strategy)
    names = list(contenders)
    runs: dict[str, list[MeasuredReply]] = {name: [] for name in names}
    asked: dict[int, Question] = {}
    for number, question in enumerate(questions):
        drawn = params.for_row(number)
        try:
            if not asked:
                for contender in contenders.values():
                    contender(question, drawn)
            replies = {name: contenders[name](question, drawn) for name in rotated(names, number)}
        except InputError as error:
            failed(question, error)
        else:
            asked[number] = question
            for name, reply in replies.items():
                runs[name].append(reply)
        progress(number + 1, len(questions))
    if not asked:
        raise InputError("None of the questions could be asked.")
    own = params.temperature or vlm.decoder.bits is not None
    reference = AUTOREGRESSIVE if own else TRANSFORMERS
    # Dividing logits by a small temperature enlarges their rounding, too.
    tie = MAX_TIE_GAPS[vlm.decoder.dtype] / min(params.temperature or 1.0, 1.0)
    with ExactModel(vlm) as exact:
        verdicts = {
            name: [
                verdict(exact, question, params.for_row(number), pair, tie)
                for (number, question), *pair in zip(
                    asked.items(), replies, runs[reference], strict=True
                )
            ]
            for name, replies in runs.items()
        }
    return Measured(
        [summarise(name, runs, verdicts[name], range(len(asked))) for name in names],
        {
            kind: [summarise(name, runs, verdicts[name], places) for name in names]
            for kind, places in places_by_kind(list(asked.values())).items()
        },
    )


def places_by_kind(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Return the places of the questions of each kind, without those that have none."""
    found: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        if question.kind:
            found.setdefault(question.kind, []).append(place)
    return found


def verdict(
    exact: ExactModel,
    question: Question,
    params: SamplingParams,
    replies: Sequence[MeasuredReply],
    tie: float,
) -> Verdict:
    """Return how a reply compares with the reference's.

    Args:
        exact: The model in float64, to tell ties from other differences.
        question: The question.
        params: How tokens were chosen.
        replies: The reply and the reference's.
        tie: The gap between the two best logits below which a difference is a tie.
    """
    own, expected = (reply.token_ids for reply in replies)
    if own == expected:
        return Verdict.IDENTICAL
    asked = dialogue_of(exact.vlm, question)
    gap = best_gap(exact, asked, own, expected, **options_of(params))[1]
    return Verdict.TIE if gap < tie else Verdict.DIFFERENT


def summarise(
    name: str,
    runs: Mapping[str, Sequence[MeasuredReply]],
    verdicts: Sequence[Verdict],
    places: Sequence[int],
) -> StrategyResult:
    """Return one contender's result.

    Args:
        name: The contender's name.
        runs: All contenders' replies to the questions, by the contenders' names.
        verdicts: How the contender's own replies compare with the reference's.
        places: The numbers of the questions that count.
    """

    def statistics_of(contender: str) -> list[DecodingStatistics]:
        return [runs[contender][place].statistics for place in places]

    mine, ordinary = statistics_of(name), statistics_of(AUTOREGRESSIVE)
    found = Counter(verdicts[place] for place in places)
    worth = Acceptance.over(mine)
    tpot = [one.tpot_ms for one in mine if one.tpot_ms is not None]
    return StrategyResult(
        strategy=name,
        replies=len(mine),
        tokens=statistics.median(one.tokens for one in mine),
        identical=not found[Verdict.DIFFERENT],
        different=found[Verdict.DIFFERENT] + found[Verdict.TIE],
        ties=found[Verdict.TIE],
        speedup=speedup(ordinary, mine),
        speedup_end_to_end=speedup(ordinary, mine, whole=True),
        speedup_vs_transformers=speedup(statistics_of(TRANSFORMERS), mine)
        if TRANSFORMERS in runs
        else None,
        acceptance_length=worth.length,
        acceptance_rate=worth.rate,
        draft_length=worth.draft_length,
        ttft_ms=Spread.of([one.ttft_ms for one in mine]),
        tpot_ms=Spread.of(tpot) if tpot else None,
    )
