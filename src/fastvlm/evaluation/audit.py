"""Identity over a whole data set: every strategy's tokens against ordinary decoding.

Ordinary decoding is `transformers`' own `generate`. Batches make it quick; rows accept different
numbers and end at different times, as they do in serving. In a short precision the width of a pass
alone changes tokens, so there is another reference: our own ordinary decoding with passes as wide
as those that verify, one request at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvlm.data.journal import append_line, whole_lines
from fastvlm.data.questions import Question
from fastvlm.decoding import Decoding, Drafter, Request
from fastvlm.decoding.strategies import Autoregressive
from fastvlm.evaluation.benchmark import TIES, best_gap
from fastvlm.evaluation.measuring import no_progress
from fastvlm.functional.errors import InputError
from fastvlm.vision.pictures import prepare
from fastvlm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Difference:
    """A reply that differs from the reference.

    Args:
        question: Its number.
        position: The first token that differs.
        gap: How far apart the target's two best logits are there, in float64.
    """

    question: int
    position: int
    gap: float


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found.

    Args:
        replies: The reference replies' tokens.
        differences: For each strategy, the replies that differ.
        acceptance_length: For each strategy, its tokens per pass of the full model.
        gap: What the two best logits must lie within, in float64, for a difference to be a tie:
            what is usual in the model's precision, and nothing where all passes were wide.
    """

    replies: list[list[int]]
    differences: dict[str, list[Difference]]
    acceptance_length: dict[str, float]
    gap: float

    def identical(self, strategy: str) -> int:
        """Return how many of a strategy's replies have the reference's very tokens."""
        return len(self.replies) - len(self.differences[strategy])

    def ties(self, strategy: str) -> int:
        """Return how many of a strategy's differences are ties: rounding alone decides there."""
        return sum(difference.gap < self.gap for difference in self.differences[strategy])

    def to_json(self) -> dict[str, Any]:
        """Return the counts, and every difference that there is."""
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
    drafters: Mapping[str, Drafter],
    questions: Sequence[Question],
    journal: Path,
    *,
    batch: int = 50,
    max_new_tokens: int = 160,
    wide: bool = False,
    progress: Callable[[int, int], None] = no_progress,
) -> Audit:
    """Decode every question ordinarily and with every strategy, and compare.

    Args:
        vlm: The model.
        drafters: The strategies by name.
        questions: All with one prompt, so that a batch needs no padding.
        journal: A JSON-lines file of finished batches; a stopped audit goes on from it.
        batch: Questions decoded together.
        max_new_tokens: The most tokens of a reply.
        wide: Whether ordinary decoding is ours, with passes as wide as those that verify, one
            question at a time: then there is no difference in any precision.
        progress: Called with the questions done and their number.

    Raises:
        InputError: The prompts differ, or the journal belongs to another audit.
    """
    if len({question.prompt for question in questions}) != 1:
        raise InputError("The questions of one audit must have one prompt.")
    batch = 1 if wide else batch
    width = 1 + max(drafter.margin for drafter in drafters.values()) if wide else None
    plan = {
        "names": sorted(drafters),
        "questions": len(questions),
        "batch": batch,
        "dtype": str(vlm.decoder.dtype).removeprefix("torch."),
        "width": width,
    }
    lines = whole_lines(journal)
    if lines and lines[0] != plan:
        raise InputError(f"{journal} belongs to an audit with {lines[0]}, but this one has {plan}.")
    if not lines:
        append_line(journal, plan)
    done = lines[1:]
    for start in range(len(done) * batch, len(questions), batch):
        asked = questions[start : start + batch]
        done.append(audit_batch(vlm, drafters, asked, start, max_new_tokens, width))
        append_line(journal, done[-1])
        progress(min(start + batch, len(questions)), len(questions))
    return Audit(
        replies=[reply for part in done for reply in part["replies"]],
        differences={
            name: [Difference(*found) for part in done for found in part[name]["differences"]]
            for name in drafters
        },
        acceptance_length={
            name: sum(part[name]["tokens"] for part in done)
            / max(1, sum(part[name]["cycles"] for part in done))
            for name in drafters
        },
        gap=0.0 if wide else TIES[vlm.decoder.dtype],
    )


def audit_batch(
    vlm: VisionLanguageModel,
    drafters: Mapping[str, Drafter],
    questions: Sequence[Question],
    first: int,
    limit: int,
    width: int | None,
) -> dict[str, Any]:
    """Return one batch's reference replies, and for each strategy what differs from them."""
    pictures = [question.open(vlm.image_size) for question in questions]

    def decoded(drafter: Drafter) -> list[Request]:
        requests = [
            vlm.request(question.prompt, picture, max_new_tokens=limit)
            for question, picture in zip(questions, pictures, strict=True)
        ]
        for request in requests:
            # What is kept of other passes was computed in other widths.
            request.store = None if width is not None else request.store
        for _ in Decoding(vlm.decoder, drafter, requests, width):
            pass
        return requests

    started = time.perf_counter()
    # The first layers run apart from the others in drafting, and must do so in the reference.
    exits = {0 if width is None else drafter.exit_layer for drafter in drafters.values()}
    references = {
        exit_layer: reference_replies(vlm, questions[0].prompt, pictures, limit)
        if width is None
        else [request.reply for request in decoded(Autoregressive(exit_layer))]
        for exit_layer in sorted(exits)
    }
    found: dict[str, Any] = {
        "replies": references[min(exits)],
        "seconds": time.perf_counter() - started,
    }
    for name, drafter in drafters.items():
        started = time.perf_counter()
        requests = decoded(drafter)
        replies = references[0 if width is None else drafter.exit_layer]
        differences = []
        for row, (request, reply) in enumerate(zip(requests, replies, strict=True)):
            if request.reply != reply:
                position, gap = best_gap(vlm, questions[row], reply, request.reply)
                differences.append([first + row, position, gap])
        found[name] = {
            "differences": differences,
            "tokens": sum(len(request.reply) - 1 for request in requests),
            "cycles": sum(len(request.accepted) for request in requests),
            "seconds": time.perf_counter() - started,
        }
    return found


@torch.inference_mode()
def reference_replies(
    vlm: VisionLanguageModel, prompt: str, pictures: Sequence[Any], limit: int
) -> list[list[int]]:
    """Return `transformers`' greedy replies to one prompt about several pictures."""
    row = vlm.tokens(prompt, pictures=1)
    tokens = torch.tensor([row] * len(pictures), device=vlm.decoder.device)
    pixels = torch.cat([prepare(picture, vlm.image_size) for picture in pictures])
    out = vlm.model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=pixels.to(vlm.decoder.device, vlm.decoder.dtype),
        max_new_tokens=limit,
        do_sample=False,
    )
    return [cut(reply, vlm.end_tokens) for reply in out[:, len(row) :].tolist()]


def cut(reply: list[int], ends: frozenset[int]) -> list[int]:
    """Return a reply up to its end token, without the padding behind it."""
    for index, token in enumerate(reply):
        if token in ends:
            return reply[: index + 1]
    return reply
