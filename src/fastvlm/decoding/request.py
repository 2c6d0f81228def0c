"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastvlm.decoding.prefix_cache import PrefixCache
from fastvlm.decoding.sampler import Sampler
from fastvlm.decoding.text import ReplyText
from fastvlm.functional.statistics import DecodingStatistics
from fastvlm.language.decoder_inputs import DecoderInputs

if TYPE_CHECKING:
    from fastvlm.decoding.strategies import Strategy

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a reply's token, from the target's unprocessed logits.

    Args:
        token_id: The token.
        logprob: Its natural logarithm.
        top: The most likely tokens at its position with their log-probabilities.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(slots=True, eq=False)
class Request:
    """A reply to decode, then the decoded reply and its statistics.

    Args:
        inputs: The prompt.
        strategy: How drafts are made; a strategy may serve any number of requests at once.
        max_new_tokens: The maximum number of tokens in the reply.
        sampler: How tokens are chosen.
        end_token_ids: Tokens that end the reply.
        prefix_cache: Where states of earlier requests are looked up, and this one's are kept.
        started: When its work began (`time.perf_counter`, seconds), for the time to first token.
        stops: Called after each token with the reply and the logits of each of its tokens, where
            these are kept; returns whether the reply ends there.
        stop_text: The reply's text, whose stop strings end the reply.
        keeps_logits: Whether the target's logits of each token are kept.
        on_token: Called with each token of the reply, in the thread that makes the step.
        logprobs: The number of most likely tokens whose log-probabilities are returned at each
            position, beside that of the chosen one; None for no log-probabilities.
        priority: Requests of lower priority enter earlier, see `Admission`.
    """

    inputs: DecoderInputs
    strategy: Strategy
    max_new_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    end_token_ids: frozenset[int] = frozenset()
    prefix_cache: PrefixCache | None = None
    started: float = field(default_factory=time.perf_counter)
    stops: Callable[[list[int], list[Tensor]], bool] | None = None
    stop_text: ReplyText | None = None
    keeps_logits: bool = False
    on_token: Callable[[int], None] | None = None
    logprobs: int | None = None
    priority: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    """Whether each token of the reply was drafted and accepted."""
    times: list[float] = field(default_factory=list)
    """When each token of the reply was known."""
    proposed: list[int] = field(default_factory=list)
    """Drafted tokens of each cycle."""
    accepted: list[int] = field(default_factory=list)
    """Accepted tokens of each cycle."""
    logits: list[Tensor] = field(default_factory=list)
    """The target's logits of each token, (vocabulary,), where they are kept."""
    token_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached: int = 0
    """Positions of the prompt that were taken over from earlier requests."""
    added: bool = False
    """Whether an engine has it, or had it."""
    turn: float = 0.0
    """Who waits enters in the order of it, in seconds of the engine's clock."""
    autocast: tuple[bool, torch.dtype] = (False, torch.float32)
    """Whether it computes in mixed precision, and in which: as the thread that added it."""
    kind: tuple[int, str] = (0, "")
    """What requests have in common that go through a cycle together."""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    """Why the request failed, where `finish_reason` is "error"."""

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's tokens, a placeholder for each visual token."""
        return self.inputs.token_ids

    @property
    def finished(self) -> bool:
        """Whether the reply has ended."""
        return self.finish_reason is not None

    @property
    def statistics(self) -> DecodingStatistics:
        """The reply's timings and acceptance."""
        return DecodingStatistics.of(self.started, self.times, self.proposed, self.accepted)

    def new_text(self, tokenizer: PreTrainedTokenizerBase) -> ReplyText:
        """Return the reply's text before its first token, which ends where the reply does."""
        known = self.stop_text
        if known is None:
            return ReplyText(tokenizer)
        return ReplyText(tokenizer, known.stop, known.min_tokens)

    @classmethod
    def failed(cls, error: Exception, strategy: Strategy) -> Request:
        """Return a request that failed before there was a prompt."""
        request = cls(DecoderInputs([], torch.empty(0, 0)), strategy, 1)
        request.fail(error)
        return request

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        self.error, self.finish_reason = error, "error"

    def deliver(self, token_ids: Sequence[int], logits: Tensor, now: float) -> None:
        """Add a cycle's tokens, cut where the reply ends.

        Args:
            token_ids: The tokens; all but the last one were drafted.
            logits: The target's logits, (tokens or more, vocabulary).
            now: When the tokens were known, in seconds.
        """
        for index, token in enumerate(token_ids):
            if self.finished:
                # The tokens before have ended it, or another thread has cancelled it.
                return
            self._keep(token, logits[index])
            self.drafted.append(index < len(token_ids) - 1)
            self.times.append(now)
            # The token last: another thread that sees it finds the rest.
            self.output_token_ids.append(token)
            if self.on_token is not None:
                self.on_token(token)
            if token in self.end_token_ids or self._stopped():
                self.finish_reason = "stop"
            elif len(self.output_token_ids) >= self.max_new_tokens:
                self.finish_reason = "length"

    def _stopped(self) -> bool:
        reply = self.output_token_ids
        if self.stops is not None and self.stops(reply, self.logits):
            return True
        return self.stop_text is not None and self.stop_text.follow(reply)

    def _keep(self, token: int, logits: Tensor) -> None:
        if self.keeps_logits:
            self.logits.append(logits.clone())
        if self.logprobs is None:
            return
        values = logits.float().log_softmax(-1)
        top = values.topk(self.logprobs)
        best = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self.token_logprobs.append(TokenLogprob(token, float(values[token]), best))
