"""Strategies measured against each other and against `transformers`, interleaved in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from fastvlm.data.questions import Question
from fastvlm.decoding import Strategy
from fastvlm.evaluation.measuring import no_progress, refuse, rotated, run_request, speedup
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


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """One strategy's result over all questions.

    Args:
        strategy: The strategy's name.
        replies: The number of questions measured.
        tokens: Median number of tokens in a reply.
        identical: Whether every reply has the same tokens as `transformers`' own `generate`, but
            for the `ties`.
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
    vlm: VisionLanguageModel, strategy: Strategy, question: Question, max_new_tokens: int
) -> MeasuredReply:
    """Return a strategy's reply to a question.

    Args:
        vlm: The model.
        strategy: The strategy.
        question: The question.
        max_new_tokens: The maximum number of tokens in the reply.

    Raises:
        InputError: The image can't be read, or the prompt doesn't fit into the model's context.
    """
    messages = dialogue_of(vlm, question)
    request = run_request(vlm, strategy, messages, max_new_tokens=max_new_tokens)
    return MeasuredReply(tuple(request.output_token_ids), request.statistics)


def measure(
    vlm: VisionLanguageModel,
    strategies: Mapping[str, Strategy],
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 160,
    progress: Callable[[int, int], None] = no_progress,
    failed: Callable[[Question, InputError], None] = refuse,
) -> list[StrategyResult]:
    """Measure strategies, and `transformers`' `generate`, on the same questions.

    Every contender answers a question before the next question begins, in an order that rotates, so
    that changes of the machine's speed affect all contenders alike. The first question is answered
    once beforehand without being measured.

    Args:
        vlm: The model.
        strategies: The strategies by name, with `autoregressive`, the baseline of speedup.
        questions: At least one question.
        max_new_tokens: The maximum number of tokens in a reply.
        progress: Called with the questions done and their total.
        failed: Called with a question that can't be asked and the reason; unless it raises, the
            question is left out for every contender.

    Raises:
        InputError: Raised by `failed`, or no question could be asked.
    """
    contenders: dict[str, Callable[[Question], MeasuredReply]] = {
        TRANSFORMERS: lambda question: run_transformers(vlm, question, max_new_tokens)
    }
    for name, strategy in strategies.items():
        contenders[name] = partial(run_strategy, vlm, strategy, max_new_tokens=max_new_tokens)
    names = list(contenders)
    runs: dict[str, list[MeasuredReply]] = {name: [] for name in names}
    asked: list[Question] = []
    for number, question in enumerate(questions):
        try:
            if not asked:
                for contender in contenders.values():
                    contender(question)
            replies = {name: contenders[name](question) for name in rotated(names, number)}
        except InputError as error:
            failed(question, error)
        else:
            asked.append(question)
            for name, reply in replies.items():
                runs[name].append(reply)
        progress(number + 1, len(questions))
    if not asked:
        raise InputError("None of the questions could be asked.")
    with ExactModel(vlm) as exact:
        return [summarise(exact, name, runs, asked) for name in names]


def summarise(
    exact: ExactModel,
    name: str,
    runs: Mapping[str, Sequence[MeasuredReply]],
    questions: Sequence[Question],
) -> StrategyResult:
    """Return one contender's result.

    Args:
        exact: The model in float64, to tell ties from other differences.
        name: The contender's name.
        runs: All contenders' replies to the questions, by the contenders' names.
        questions: The questions.
    """
    own, reference = runs[name], runs[TRANSFORMERS]
    mine = [run.statistics for run in own]
    ordinary = [run.statistics for run in runs[AUTOREGRESSIVE]]
    differing = [
        (question, run.token_ids, expected.token_ids)
        for question, run, expected in zip(questions, own, reference, strict=True)
        if run.token_ids != expected.token_ids
    ]
    vlm = exact.vlm
    tie = MAX_TIE_GAPS[vlm.decoder.dtype]
    ties = sum(
        best_gap(exact, dialogue_of(vlm, question), one, other)[1] < tie
        for question, one, other in differing
    )
    worth = Acceptance.over(mine)
    tpot = [one.tpot_ms for one in mine if one.tpot_ms is not None]
    return StrategyResult(
        strategy=name,
        replies=len(own),
        tokens=statistics.median(one.tokens for one in mine),
        identical=len(differing) == ties,
        different=len(differing),
        ties=ties,
        speedup=speedup(ordinary, mine),
        speedup_end_to_end=speedup(ordinary, mine, whole=True),
        speedup_vs_transformers=speedup([run.statistics for run in reference], mine),
        acceptance_length=worth.length,
        acceptance_rate=worth.rate,
        draft_length=worth.draft_length,
        ttft_ms=Spread.of([one.ttft_ms for one in mine]),
        tpot_ms=Spread.of(tpot) if tpot else None,
    )
