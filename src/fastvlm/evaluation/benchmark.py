"""Strategies measured against each other and against `transformers`, interleaved in one run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from fastvlm.data.questions import Question
from fastvlm.decoding import Drafter
from fastvlm.evaluation.measuring import answered, in_turn, no_progress, speedup
from fastvlm.functional.statistics import Acceptance, DecodingStatistics, Spread
from fastvlm.vision.pictures import prepare
from fastvlm.vlm import VisionLanguageModel

TRANSFORMERS = "transformers"
AUTOREGRESSIVE = "autoregressive"
TIES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}
"""Two best logits that lie closer than this may change places by rounding alone. In the short
precisions it is two steps of a number between 16 and 32, where the best logits of language models
often lie."""


@dataclass(frozen=True, slots=True)
class Run:
    """One strategy's reply to one question."""

    tokens: tuple[int, ...]
    statistics: DecodingStatistics


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """One strategy over all questions.

    Args:
        strategy: Its name.
        replies: Questions measured.
        tokens: Median length of a reply.
        identical: Whether every reply has the same tokens as `transformers`' own `generate`, but
            for the `ties`.
        different: Replies that differ, ties counted.
        ties: Replies that differ first where the two best logits lie within `TIES`.
        speedup: Median over the questions of the autoregressive time per output token over this
            strategy's, and its quartiles.
        speedup_end_to_end: The same for whole replies, picture and prefill included.
        speedup_vs_transformers: As `speedup`, against `transformers`' own `generate`.
        acceptance_length: Tokens per pass of the full model, over all replies.
        acceptance_rate: Accepted tokens per drafted one, over all replies.
        draft_length: Drafted tokens per cycle, over all replies.
        ttft_ms: Time to first token.
        tpot_ms: Time per output token after the first.
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
    """Notes when `transformers`' generate hands over each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Note a token's time; the first call brings the prompt."""
        del value
        if self.prompt_seen:
            self.times.append(time.perf_counter())
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do."""


@torch.inference_mode()
def run_transformers(vlm: VisionLanguageModel, question: Question, limit: int) -> Run:
    """Answer a question with `transformers`' own greedy `generate`."""
    picture = question.open(vlm.image_size)
    started = time.perf_counter()
    tokens = torch.tensor([vlm.tokens(question.prompt, pictures=1)], device=vlm.decoder.device)
    pixels = prepare(picture, vlm.image_size).to(vlm.decoder.device, vlm.decoder.dtype)
    clock = TokenTimes()
    out = vlm.model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=pixels,
        max_new_tokens=limit,
        do_sample=False,
        streamer=clock,
    )
    reply = tuple(out[0, tokens.shape[1] :].tolist())
    return Run(reply, DecodingStatistics.of(started, clock.times, [], []))


def run_strategy(vlm: VisionLanguageModel, drafter: Drafter, question: Question, limit: int) -> Run:
    """Answer a question with one of our strategies."""
    picture = question.open(vlm.image_size)
    request = answered(vlm, drafter, question.prompt, picture, max_new_tokens=limit)
    return Run(tuple(request.reply), vlm.reply(request).statistics)


@torch.inference_mode()
def best_gap(
    vlm: VisionLanguageModel, question: Question, one: Sequence[int], other: Sequence[int]
) -> tuple[int, float]:
    """Return where two replies first differ, and how far apart the two best logits are there.

    The logits are computed in float64 from scratch.
    """
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    prompt = vlm.tokens(question.prompt, pictures=1)
    tokens = torch.tensor([[*prompt, *one[:same]]], device=vlm.decoder.device)
    pixels = prepare(question.open(vlm.image_size), vlm.image_size).to(tokens.device)
    exact = copy.deepcopy(vlm.model).double()
    logits = exact(input_ids=tokens, pixel_values=pixels.double()).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    return same, best - second


def measure(
    vlm: VisionLanguageModel,
    drafters: Mapping[str, Drafter],
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 160,
    progress: Callable[[int, int], None] = no_progress,
) -> list[StrategyResult]:
    """Measure strategies, and `transformers`' generate, on the same questions.

    For each question every contender runs once before the next question, in an order that turns, so
    that a machine whose speed drifts is as kind to one as to another. The first question is
    answered once more beforehand, unmeasured.

    Args:
        vlm: The model.
        drafters: The strategies by name; `autoregressive` among them, the measure of speedup.
        questions: At least one question.
        max_new_tokens: The most tokens of a reply.
        progress: Called with the questions done and their number.
    """
    contenders: dict[str, Callable[[Question], Run]] = {
        TRANSFORMERS: lambda question: run_transformers(vlm, question, max_new_tokens)
    }
    for name, drafter in drafters.items():
        contenders[name] = lambda question, drafter=drafter: run_strategy(  # type: ignore[misc]
            vlm, drafter, question, max_new_tokens
        )
    names = list(contenders)
    for contender in contenders.values():
        contender(questions[0])
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number, question in enumerate(questions):
        for name in in_turn(names, number):
            runs[name].append(contenders[name](question))
        progress(number + 1, len(questions))
    return [summarise(vlm, name, runs, questions) for name in names]


def summarise(
    vlm: VisionLanguageModel,
    name: str,
    runs: Mapping[str, Sequence[Run]],
    questions: Sequence[Question],
) -> StrategyResult:
    """Return one contender's result from everybody's runs."""
    own, reference = runs[name], runs[TRANSFORMERS]
    mine = [run.statistics for run in own]
    ordinary = [run.statistics for run in runs[AUTOREGRESSIVE]]
    differing = [
        (question, run.tokens, expected.tokens)
        for question, run, expected in zip(questions, own, reference, strict=True)
        if run.tokens != expected.tokens
    ]
    tie = TIES[vlm.decoder.dtype]
    ties = sum(best_gap(vlm, *difference)[1] < tie for difference in differing)
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
