"""Audit of identical output: every strategy's tokens against ordinary decoding, over a data set.

For greedy replies ordinary decoding is `transformers`' own `generate`. Requests are decoded in
batches, in which they accept different numbers of tokens and end at different times, as in serving.
In a short precision the width of a pass alone changes tokens, so there is another reference: our
own ordinary decoding with passes as wide as a verify, one request at a time. Sampled replies are
compared with our ordinary decoding, too: each is a function of model, prompt and seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastvlm.data.journal import append_line, whole_lines
from fastvlm.data.questions import Question
from fastvlm.decoding import Autoregressive, Engine, Request, SamplingParams, Strategy
from fastvlm.decoding.options import SAMPLING_OPTION_NAMES
from fastvlm.drafting.fingerprint import weights_hash
from fastvlm.evaluation.measuring import DEFAULT_SAMPLING_PARAMS, no_progress, refuse, run_requests
from fastvlm.evaluation.reference import (
    MAX_TIE_GAPS,
    ExactModel,
    best_gap,
    dialogue_of,
    reference_replies,
)
from fastvlm.functional.digests import digest, digest_of_weights
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import locked
from fastvlm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Difference:
    """A reply that differs from the reference.

    Args:
        question: The question's number.
        position: The first token that differs.
        gap: The gap between the target's two best tokens there, see `best_gap`.
    """

    question: int
    position: int
    gap: float


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit.

    Args:
        replies: The reference replies' tokens, by the questions' numbers; questions that could not
            be asked are left out.
        differences: The replies of each strategy that differ.
        acceptance_length: Each strategy's tokens per pass of the full model.
        gap: The maximum gap between the two best tokens, in float64, for a difference to be a tie:
            that of the model's precision, and 0 where all passes were wide.
    """

    replies: dict[int, list[int]]
    differences: dict[str, list[Difference]]
    acceptance_length: dict[str, float]
    gap: float

    def identical(self, strategy: str) -> int:
        """Return how many of a strategy's replies have exactly the reference's tokens."""
        return len(self.replies) - len(self.differences[strategy])

    def ties(self, strategy: str) -> int:
        """Return how many of a strategy's differences are ties, decided by rounding alone."""
        return sum(difference.gap < self.gap for difference in self.differences[strategy])

    def to_json(self) -> dict[str, Any]:
        """Return the counts, and all differences."""
        return {
            name: {
                "replies": len(self.replies),
                "identical": self.identical(name),
                "ties": self.ties(name),
                "different": len(found) - self.ties(name),
                "acceptance_length": self.acceptance_length[name],
                "differences": [[d.question, d.position, d.gap] for d in found],
            }
            for name, found in self.differences.items()
        }


def audit(
    vlm: VisionLanguageModel,
    strategies: Mapping[str, Strategy],
    questions: Sequence[Question],
    journal: Path,
    *,
    params: SamplingParams = DEFAULT_SAMPLING_PARAMS,
    wide: bool = False,
    progress: Callable[[int, int], None] = no_progress,
    failed: Callable[[Question, InputError], None] = refuse,
) -> Audit:
    """Decode every question without drafts and with every strategy, and compare.

    Args:
        vlm: The model; its engine gets as many questions at a time as it has slots.
        strategies: The strategies by name.
        questions: At least one question.
        journal: A JSON-lines file of finished batches; a stopped audit resumes from it, and asks
            questions that failed again.
        params: How replies are decoded: question i with the seed + i. Values that are None are
            those of `DEFAULT_SAMPLING_PARAMS`, and a seed of 0.
        wide: Whether the reference is fastvlm's own decoding without drafts, with passes as wide as
            a verify, one question at a time: then there is no difference in any precision.
        progress: Called with the questions done and their total.
        failed: Called with a question that can't be asked and the reason; unless it raises, the
            question is left out for every strategy.

    Raises:
        InputError: Raised by `failed`, no question could be asked, or the journal belongs to
            another audit.
    """
    batch = 1 if wide else vlm.engine.max_slots
    width = 1 + max(one.max_draft_tokens for one in strategies.values()) if wide else None
    if params.temperature and params.seed is None:
        params = replace(params, seed=0)
    if params.max_new_tokens is None:
        params = replace(params, max_new_tokens=DEFAULT_SAMPLING_PARAMS.max_new_tokens)
    plan = {
        "model": weights_hash(vlm.model),
        "strategies": {name: identity(one) for name, one in sorted(strategies.items())},
        "questions": digest([asdict(one) for one in questions]),
        "batch": batch,
        "dtype": str(vlm.decoder.dtype).removeprefix("torch."),
        "width": width,
        "sampling": asdict(params),
    }
    with locked(journal.parent), ExactModel(vlm) as exact:
        lines = whole_lines(journal)
        if lines and lines[0] != plan:
            raise InputError(
                f"{journal} belongs to an audit of another model, other questions or other options;"
                " choose another --output."
            )
        if not lines:
            append_line(journal, plan)
        done = lines[1:]
        if not all(isinstance(part, dict) and "numbers" in part for part in done):
            raise InputError(f"{journal} has lines that are no batch of an audit.")
        known = {number for part in done for number in part["numbers"]}
        left = [number for number in range(len(questions)) if number not in known]

        def parts(numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
            asked = {number: questions[number] for number in numbers}
            try:
                yield audit_batch(exact, strategies, asked, params, width)
            except InputError as error:
                if len(numbers) == 1:
                    failed(questions[numbers[0]], error)
                else:  # One of them: the others are asked without it.
                    middle = len(numbers) // 2
                    yield from parts(numbers[:middle])
                    yield from parts(numbers[middle:])

        for start in range(0, len(left), batch):
            for part in parts(left[start : start + batch]):
                append_line(journal, part)
                done.append(part)
            progress(len(known) + min(start + batch, len(left)), len(questions))
    if not done:
        raise InputError("None of the questions could be asked.")
    # Dividing logits by a small temperature enlarges their rounding, too.
    tie = MAX_TIE_GAPS[vlm.decoder.dtype] / min(params.temperature or 1.0, 1.0)
    return Audit(
        replies=dict(
            sorted(
                pair for part in done for pair in zip(part["numbers"], part["replies"], strict=True)
            )
        ),
        differences={
            name: [Difference(*found) for part in done for found in part[name]["differences"]]
            for name in strategies
        },
        acceptance_length={
            name: sum(part[name]["tokens"] for part in done)
            / max(1, sum(part[name]["cycles"] for part in done))
            for name in strategies
        },
        gap=0.0 if wide else tie,
    )


def identity(strategy: Strategy) -> dict[str, Any]:
    """Return the settings that distinguish a strategy from others of its name."""
    network = getattr(strategy, "network", None)
    return {
        "exit_layer": strategy.exit_layer,
        "max_draft_tokens": strategy.max_draft_tokens,
        "skipped": list(getattr(strategy, "skipped", None) or ()),
        "network": None if network is None else digest_of_weights(network),
    }


def audit_batch(
    exact: ExactModel,
    strategies: Mapping[str, Strategy],
    questions: Mapping[int, Question],
    params: SamplingParams,
    width: int | None,
) -> dict[str, Any]:
    """Return the reference replies of one batch, and each strategy's differences from them.

    Args:
        exact: The model.
        strategies: The strategies by name.
        questions: The questions by number.
        params: How replies are decoded; question i with the seed + i.
        width: Positions of every verify in the engine; None for as many as it needs.

    Raises:
        InputError: A question can't be asked.
    """
    vlm = exact.vlm
    dialogues = {number: dialogue_of(vlm, asked) for number, asked in questions.items()}
    engine = vlm.engine
    if width is not None:
        engine = Engine(vlm.decoder, max_slots=1, verify_width=width)
    options = {
        number: {name: getattr(params.for_row(number), name) for name in SAMPLING_OPTION_NAMES}
        for number in dialogues
    }
    ordinary = params == SamplingParams(max_new_tokens=params.max_new_tokens)

    def requests(strategy: Strategy) -> Iterator[Request]:
        for number, messages in dialogues.items():
            request = vlm.request(messages, strategy=strategy, **options[number])
            if width is not None:
                # What is kept of other passes was computed in other widths.
                request.prefix_cache = None
            yield request

    def decoded(strategy: Strategy) -> list[Request]:
        return run_requests(engine, requests(strategy))

    def replies(exit_layer: int) -> list[list[int]]:
        if width is None and ordinary and vlm.decoder.bits is None:
            return reference_replies(vlm, list(dialogues.values()), params.max_new_tokens or 0)
        return [request.output_token_ids for request in decoded(Autoregressive(exit_layer))]

    def exit_layer_of(strategy: Strategy) -> int:
        # The first layers run apart from the others in drafting, and must do so in the reference,
        # where not even rounding may differ.
        return 0 if width is None else strategy.exit_layer

    started = time.perf_counter()
    exits = sorted({exit_layer_of(strategy) for strategy in strategies.values()})
    references = {exit_layer: replies(exit_layer) for exit_layer in exits}
    found: dict[str, Any] = {
        "numbers": list(dialogues),
        "replies": references[exits[0]],
        "seconds": time.perf_counter() - started,
    }
    for name, strategy in strategies.items():
        started = time.perf_counter()
        done = decoded(strategy)
        expected = references[exit_layer_of(strategy)]
        differences = [
            [number, *best_gap(exact, dialogues[number], reply, own, **options[number])]
            for number, reply, own in zip(
                dialogues, expected, (request.output_token_ids for request in done), strict=True
            )
            if reply != own
        ]
        found[name] = {
            "differences": differences,
            "tokens": sum(len(request.output_token_ids) - 1 for request in done),
            "cycles": sum(len(request.accepted) for request in done),
            "seconds": time.perf_counter() - started,
        }
    return found
