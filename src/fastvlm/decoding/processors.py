"""Logits processors: those of `transformers` that treat all tokens alike, and OpenAI's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import logits_process as processing

from fastvlm.decoding.sampling_params import SamplingParams
from fastvlm.functional.errors import InputError

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""Maps (batch, length) tokens and (batch, vocabulary) scores to new scores."""


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Adds to the logits of some tokens.

    Args:
        bias: What is added to each token's logit.
    """

    bias: Mapping[int, float]

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with the bias: (batch, vocabulary)."""
        tokens = torch.tensor(list(self.bias), device=scores.device)
        added = scores.new_tensor(list(self.bias.values()))
        return scores.index_add(1, tokens, added.expand(len(scores), -1))


@dataclass(frozen=True, slots=True)
class OccurrencePenalties:
    """Lowers the logits of tokens that are in the reply.

    Args:
        presence: What a token's logit loses if the reply has it.
        frequency: What a token's logit loses each time that the reply has it.
        prompt_length: Tokens before the reply, which don't count.
    """

    presence: float
    frequency: float
    prompt_length: int

    def __call__(self, token_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the penalised scores: (batch, vocabulary)."""
        reply = token_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, reply, counts.new_ones(reply.shape))
        return scores - self.frequency * counts - self.presence * (counts > 0)


WARPERS = (
    processing.TemperatureLogitsWarper,
    processing.TopKLogitsWarper,
    processing.TopPLogitsWarper,
    processing.MinPLogitsWarper,
    processing.TypicalLogitsWarper,
    processing.EpsilonLogitsWarper,
    processing.EtaLogitsWarper,
)
"""Processors for which all tokens are alike, so that any part of the vocabulary will do."""
PREFIX_FREE_PROCESSORS = (*WARPERS, processing.SuppressTokensLogitsProcessor, LogitBias)
"""Processors that depend on scores alone, so that all positions of a draft go at once."""


def with_openai_processors(
    processors: Sequence[LogitsProcessor],
    params: SamplingParams,
    prompt_length: int,
    vocabulary_size: int,
) -> list[LogitsProcessor]:
    """Return processors with those of `logit_bias` and of the penalties of tokens in the reply.

    The order is vLLM's: the bias goes before all others, the penalties before the temperature and
    what cuts the distribution.

    Args:
        processors: The processors of `transformers`, in its order.
        params: How the reply's tokens are chosen.
        prompt_length: Tokens before the reply.
        vocabulary_size: Size of the target's vocabulary.

    Raises:
        InputError: The bias is for a token that the model doesn't have.
    """
    found = list(processors)
    presence, frequency = params.presence_penalty or 0.0, params.frequency_penalty or 0.0
    if presence or frequency:
        place = next((i for i, one in enumerate(found) if isinstance(one, WARPERS)), len(found))
        found.insert(place, OccurrencePenalties(presence, frequency, prompt_length))
    if params.logit_bias:
        unknown = max(params.logit_bias)
        if unknown >= vocabulary_size:
            raise InputError(
                f"logit_bias has the token {unknown}, but the model has {vocabulary_size} tokens,"
                f" from 0 to {vocabulary_size - 1}."
            )
        found.insert(0, LogitBias(params.logit_bias))
    return found
