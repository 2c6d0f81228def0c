"""How well a model predicts replies, over a large vocabulary too: with little memory and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastvlm.training.branches import IGNORED
from fastvlm.training.rows import RowBuilder, TrainingRow
from fastvlm.training.target import full_precision
from fastvlm.training.task import Losses

NEGLIGIBLE_PROBABILITY = 1e-6
"""In bfloat16, tokens less probable than this at every position have no gradient: rounding a logit
of 20 to bfloat16 changes its probability by up to 6 %, and theirs together are far less."""
HEAD_POSITIONS = 128
"""Positions whose logits are computed together."""
SOFTMAX_POSITIONS = 8
"""Positions whose logits are in float32 at a time: a vocabulary of 262,144 takes 1 MiB each."""


@dataclass(frozen=True, slots=True)
class ReplyScores:
    """How well a model predicts the labelled tokens of a row.

    Args:
        losses: The cross-entropy of each: (tokens,).
        right: Whether the model's best token is the label: (tokens,).
    """

    losses: Tensor
    right: Tensor


def score_tokens(head: nn.Module, states: Tensor, targets: Tensor) -> ReplyScores:
    """Return the scores of tokens.

    Args:
        head: The LM head.
        states: What it reads, in front of each token: (tokens, d_model).
        targets: The tokens: (tokens,).
    """
    if isinstance(head, nn.Linear) and not head.weight.requires_grad and head.bias is None:
        losses, right = FrozenHeadCrossEntropy.apply(states, head.weight, targets)
        return ReplyScores(losses, right)
    logits = full_precision(head(states))
    losses = F.cross_entropy(logits, targets, reduction="none")
    return ReplyScores(losses, logits.argmax(-1) == targets)


def score_replies(
    model: PreTrainedModel, builder: RowBuilder, rows: Sequence[TrainingRow]
) -> list[ReplyScores]:
    """Return the scores of some rows, in their order."""
    found: list[ReplyScores] = []
    for inputs, labels in builder.batches(rows):
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        # Each position predicts the next; logits of the others would fill the memory.
        targets = labels[:, 1:]
        places = targets != IGNORED
        scored = score_tokens(
            model.get_output_embeddings(), states[:, :-1][places], targets[places]
        )
        counts = places.sum(1).tolist()
        found += map(ReplyScores, scored.losses.split(counts), scored.right.split(counts))
    return found


def reply_loss(model: PreTrainedModel, builder: RowBuilder, rows: Sequence[TrainingRow]) -> Losses:
    """Return the cross-entropy of some rows.

    Reported is how often the best token is right, and the loss of each kind of rows.
    """
    scores = score_replies(model, builder, rows)
    kinds: dict[str, list[Tensor]] = {}
    for row, scored in zip(rows, scores, strict=True):
        if row.kind:
            kinds.setdefault(row.kind, []).append(scored.losses.detach())
    losses = torch.cat([scored.losses for scored in scores])
    right = int(torch.cat([scored.right for scored in scores]).sum())
    report = {"right": (float(right), float(len(losses)))}
    for kind, parts in sorted(kinds.items()):
        report[kind] = (float(torch.cat(parts).sum()), float(sum(map(len, parts))))
    total = losses.sum()
    if not total.requires_grad:
        # Text alone reaches no projector; the step goes on without a gradient.
        total.requires_grad_()
    return Losses(total, len(losses), report)


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """The cross-entropy behind a frozen LM head, without keeping logits.

    The gradient of a state is the difference between the expected and the right token's row of the
    head, times the loss's own. It is computed along with the loss, of few positions at a time; few
    tokens have probability enough to count.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each token, and whether it is the best: (tokens,) both.

        Args:
            ctx: What the gradient needs.
            states: (tokens, d_model).
            weight: The head's: (vocabulary, d_model).
            targets: (tokens,).
        """
        losses, right, gradients = [], [], []
        for part, wanted in zip(
            states.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True
        ):
            # In the precision of a run's autocast, where there is one.
            logits = F.linear(part, weight)
            normaliser = torch.cat(
                [full_precision(few).logsumexp(-1) for few in logits.split(SOFTMAX_POSITIONS)]
            )
            chosen = logits.gather(1, wanted[:, None]).squeeze(1)
            losses.append(normaliser - full_precision(chosen))
            right.append(logits.amax(-1) == chosen)
            if ctx.needs_input_grad[0]:
                expected = expected_rows(logits, normaliser, weight)
                gradients.append((expected - full_precision(weight[wanted])).to(states.dtype))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        found = torch.cat(losses), torch.cat(right)
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the states: (tokens, d_model)."""
        (of_losses,) = ctx.saved_tensors
        return (gradients[0][:, None] * of_losses).to(of_losses.dtype), None, None


def expected_rows(logits: Tensor, normaliser: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of an LM head's rows under the distribution of some positions.

    Args:
        logits: (positions, vocabulary).
        normaliser: The logarithm of the sum of their exponentials: (positions,).
        weight: The head's rows: (vocabulary, d_model).

    Returns:
        (positions, d_model), in float32 at least.
    """
    if logits.dtype == torch.bfloat16:
        highest = (logits - normaliser[:, None].to(logits.dtype)).amax(0)
        kept = (highest > math.log(NEGLIGIBLE_PROBABILITY)).nonzero().squeeze(1)
        logits, weight = logits[:, kept], weight[kept]
    probabilities = torch.cat(
        [
            (full_precision(few) - less[:, None]).exp().to(logits.dtype)
            for few, less in zip(
                logits.split(SOFTMAX_POSITIONS), normaliser.split(SOFTMAX_POSITIONS), strict=True
            )
        ]
    )
    return full_precision(probabilities @ weight.to(logits.dtype))
