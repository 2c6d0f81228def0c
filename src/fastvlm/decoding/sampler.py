"""How a reply's tokens are chosen from logits: greedy or sampled, after logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper

from fastvlm.decoding.grammar import Constraint
from fastvlm.decoding.processors import PREFIX_FREE_PROCESSORS, WARPERS, LogitsProcessor
from fastvlm.functional.best import best_columns
from fastvlm.functional.errors import InputError
from fastvlm.functional.noise import BLOCK_TOKENS, gumbel, noisy_best


@dataclass(frozen=True, slots=True)
class Sampler:
    """How one request chooses its tokens: x_i = argmax(log p_i + G_i).

    Processors are applied to the target's and to the drafter's logits alike, at each position with
    that position's own prefix, as if every token had been decoded by itself. G is 0 for greedy
    decoding; for sampling it is noise that follows from the seed, the position in the reply and the
    token, so that a reply is a function of model, prompt and seed (see `functional.noise`).

    Args:
        processors: Logits processors, applied in this order. They must be stateless.
        seed: The seed of the noise; None for greedy decoding.
        prompt_token_ids: The tokens that processors see before the reply.
        constraint: The tokens that may follow, where the reply is to have a form. The logits of
            others are -inf before the processors and after them; where processors leave none of
            those that may follow, they are not applied.
    """

    processors: Sequence[LogitsProcessor] = ()
    seed: int | None = None
    prompt_token_ids: Sequence[int] = field(default=(), repr=False)
    constraint: Constraint | None = field(default=None, repr=False)

    @property
    def is_greedy(self) -> bool:
        """Whether the token is the argmax of the unprocessed logits."""
        return self.seed is None and not self.processors and self.constraint is None

    @property
    def temperature(self) -> float | None:
        """What logits are divided by, 1 for nothing; None where more is done to them."""
        if self.constraint is not None or len(self.processors) > 1:
            return None
        if not self.processors:
            return 1.0
        [one] = self.processors
        found: Any = one
        return found.temperature if type(one) is TemperatureLogitsWarper else None

    @property
    def draws_simply(self) -> bool:
        """Whether tokens are the best ones, or drawn after dividing logits: see `noise`."""
        return self.is_greedy or (self.seed is not None and self.temperature is not None)

    def noise(self, position: int, steps: int, tokens: Tensor, vocabulary_size: int) -> Tensor:
        """Return what is added to divided logits, so that the best token is the drawn one.

        Args:
            position: The first position of the reply; others follow it.
            steps: How many.
            tokens: Those that can be drawn: (tokens,).
            vocabulary_size: Size of the target's vocabulary.

        Returns:
            (steps, tokens), zeros where nothing is drawn.
        """
        if self.seed is None:
            return torch.zeros(steps, len(tokens))
        places = range(position, position + steps)
        return gumbel([self.seed] * steps, places, tokens, torch.float32, vocabulary_size)

    @property
    def needs_prefix(self) -> bool:
        """Whether a processor depends on the tokens before a position."""
        return any(type(processor) not in PREFIX_FREE_PROCESSORS for processor in self.processors)

    @property
    def needs_vocabulary(self) -> bool:
        """Whether a processor tells tokens by their columns, which are all to be there then."""
        return any(type(processor) not in WARPERS for processor in self.processors)

    def apply_processors(
        self,
        reply: Sequence[int],
        logits: Tensor,
        token_ids: Tensor | None = None,
        vocabulary_size: int | None = None,
    ) -> Tensor:
        """Return the processed logits after a reply so far, in at least float32: (tokens,).

        Args:
            reply: The reply so far.
            logits: The logits, (tokens,).
            token_ids: The tokens of the columns, (tokens,); None for the whole vocabulary.
            vocabulary_size: Size of the target's vocabulary, where only some tokens have logits.
        """
        mask = None
        if self.constraint is not None:
            mask = self.constraint.allowed(reply, vocabulary_size or logits.shape[-1])
        if mask is not None:
            mask = mask.to(logits.device)
            mask = mask[None] if token_ids is None else mask[token_ids][None]
        prefix = [*self.prompt_token_ids, *reply] if self.needs_prefix else []
        return self._processed(prefix, logits[None], mask)[0]

    def permitted(
        self, reply: Sequence[int], drafted: list[int], vocabulary_size: int
    ) -> list[int]:
        """Return a draft up to its end, or the first token that the reply's form forbids."""
        if self.constraint is None:
            return drafted
        masks = self.constraint.masks(reply, drafted, vocabulary_size)
        for count, (mask, token) in enumerate(zip(masks, drafted, strict=False)):
            if not mask[token]:
                return drafted[:count]
            if token in self.constraint.end_token_ids:
                return drafted[: count + 1]
        return drafted

    def sample(self, reply: Sequence[int], drafted: Sequence[int], logits: Tensor) -> list[int]:
        """Return the target's tokens up to the first that differs from a draft.

        Args:
            reply: The reply before the draft.
            drafted: The draft, g tokens.
            logits: The target's logits, (g + 1 or more, vocabulary).

        Raises:
            InputError: No token can follow that leads to the form that the reply is to have.
        """
        logits = logits[: len(drafted) + 1]
        if self.constraint is None:
            return self._sample(reply, drafted, logits, None)
        masks = self.constraint.masks(reply, drafted, logits.shape[-1])
        chosen = self._sample(reply, drafted, logits, masks.to(logits.device))
        for index, token in enumerate(chosen):
            if not masks[index, token]:
                said = self.constraint.error or "no token leads to it"
                raise InputError(f"The reply can't have the form that it is to have: {said}.")
            if index < len(drafted) and token != drafted[index]:
                break
        return chosen

    def _sample(
        self, reply: Sequence[int], drafted: Sequence[int], logits: Tensor, masks: Tensor | None
    ) -> list[int]:
        """Return the tokens of positions, up to the first that differs from a draft at least."""
        count, chosen = len(logits), list[int]()
        scores = None if self.needs_prefix else self._processed([], logits, masks)
        # Positions that a wrong token makes needless would take time.
        one_by_one = scores is None or (self.seed is not None and logits.device.type == "cpu")
        step = 1 if one_by_one else max(BLOCK_TOKENS // logits.shape[-1], 1)
        for begin in range(0, count, step):
            if scores is None:
                prefix = [*self.prompt_token_ids, *reply, *drafted[:begin]]
                mask = None if masks is None else masks[begin, None]
                rows = self._processed(prefix, logits[begin, None], mask)
            else:
                rows = scores[begin : begin + step]
            chosen += self._best(rows, len(reply) + begin)
            if chosen[begin:] != drafted[begin : begin + step]:
                break
        return chosen

    def _processed(
        self, prefix: Sequence[int], logits: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if not self.processors:
            return scores
        masked = scores
        tokens = torch.tensor([list(prefix)], dtype=torch.long, device=logits.device)
        # Some processors write into what they are given.
        scores = scores.clone()
        for processor in self.processors:
            scores = processor(tokens, scores)
        if mask is None:
            return scores
        scores = scores.masked_fill(~mask, -torch.inf)
        return torch.where(scores.isneginf().all(-1, keepdim=True), masked, scores)

    def _best(self, scores: Tensor, start: int) -> list[int]:
        """Return the token of each of some positions that follow one another, from a first one."""
        rows = len(scores)
        if self.seed is None:
            best = best_columns(scores)
        else:
            best = noisy_best(scores, [self.seed] * rows, range(start, start + rows))
        found: list[int] = best.tolist()
        return found


def noisy(
    scores: Tensor,
    seeds: Sequence[int | None],
    positions: Sequence[int],
    token_ids: Tensor | None = None,
) -> Tensor:
    """Return log p + G for some tokens: (rows, tokens). Without a seed, G is 0.

    Args:
        scores: Processed logits, in at least float32: (rows, tokens).
        seeds: Each row's seed.
        positions: Each row's position in its reply.
        token_ids: The tokens of the columns, (tokens,); None for the whole vocabulary.
    """
    drawn = [row for row, seed in enumerate(seeds) if seed is not None]
    if not drawn:
        return scores
    if token_ids is None:
        token_ids = torch.arange(scores.shape[-1], device=scores.device)
    noise = gumbel(
        [seed for seed in seeds if seed is not None],
        [positions[row] for row in drawn],
        token_ids,
        scores.dtype,
    )
    if len(drawn) == len(seeds):
        return scores + noise
    return scores.index_add(0, torch.tensor(drawn, device=scores.device), noise)


def target_tokens(
    samplers: Sequence[Sampler],
    replies: Sequence[Sequence[int]],
    drafts: Sequence[Sequence[int]],
    logits: Tensor,
) -> list[list[int]]:
    """Return the target's tokens for each row. See `Sampler.sample`.

    Args:
        samplers: Each row's sampler.
        replies: Each row's reply before its draft.
        drafts: Each row's draft.
        logits: The target's logits, (rows, longest draft + 1 or more, vocabulary).
    """
    if all(sampler.is_greedy for sampler in samplers):
        chosen: list[list[int]] = best_columns(logits).tolist()
        return chosen
    return [
        sampler.sample(reply, drafted, row)
        for sampler, reply, drafted, row in zip(samplers, replies, drafts, logits, strict=True)
    ]


def greedy_tokens(
    logits: Tensor, vocabulary: Tensor | None = None, *, confident: bool = True
) -> tuple[list[int], list[float]]:
    """Return each row's most likely token, and its probability by the drafter.

    Args:
        logits: The drafter's logits, (rows, draft vocabulary).
        vocabulary: The tokens of the columns, (draft vocabulary,); None for the whole vocabulary.
        confident: Whether to compute the probability, which costs a little.
    """
    best, confidences = best_columns(logits), [1.0] * len(logits)
    if confident:
        confidences = logits.softmax(-1).gather(1, best[:, None])[:, 0].tolist()
    token_ids = best if vocabulary is None else vocabulary[best]
    return token_ids.tolist(), confidences


def sampled_tokens(
    samplers: Sequence[Sampler],
    replies: Sequence[Sequence[int]],
    logits: Tensor,
    vocabulary: Tensor | None,
    vocabulary_size: int,
) -> tuple[list[int], list[float]]:
    """Return each row's token with the greatest log q + G, and its probability by the drafter.

    If processors leave nothing that can be drafted, it is any token, or any that the reply's form
    allows: a wrong draft is lossless.

    Args:
        samplers: Each row's sampler.
        replies: Each row's reply, with what is drafted so far.
        logits: The drafter's logits, (rows, draft vocabulary).
        vocabulary: The tokens of the columns, (draft vocabulary,); None for the whole vocabulary.
        vocabulary_size: Size of the target's vocabulary.
    """
    if vocabulary is not None and any(sampler.needs_vocabulary for sampler in samplers):
        whole = logits.new_full((len(logits), vocabulary_size), -torch.inf)
        logits, vocabulary = whole.index_copy(1, vocabulary, logits), None
    scores = torch.stack(
        [
            sampler.apply_processors(reply, row, vocabulary, vocabulary_size)
            for sampler, reply, row in zip(samplers, replies, logits, strict=True)
        ]
    )
    seeds = [sampler.seed for sampler in samplers if sampler.seed is not None]
    positions = [len(reply) for reply in replies]
    if len(seeds) == len(samplers):
        best = noisy_best(scores, seeds, positions, vocabulary, vocabulary_size)
    else:
        best = noisy(scores, [one.seed for one in samplers], positions, vocabulary).argmax(-1)
    confidences = scores.softmax(-1).gather(1, best[:, None])[:, 0].nan_to_num(0.0)
    token_ids = (best if vocabulary is None else vocabulary[best]).tolist()
    for row, (sampler, reply) in enumerate(zip(samplers, replies, strict=True)):
        if sampler.constraint is not None:
            mask = sampler.constraint.allowed(reply, vocabulary_size)
            if mask is not None and not mask[token_ids[row]]:
                token_ids[row] = int(mask.int().argmax())
    return token_ids, confidences.tolist()
