"""The strategies: ways of drafting that share one engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.selection import Drawn
from fastvlm.decoding.token_by_token import TokenByToken
from fastvlm.drafting.draft_length import DraftLength, FixedLength
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.language.cache import Span
from fastvlm.language.decoder import SplitDecoder


@dataclass(slots=True)
class Draft:
    """What one cycle proposes.

    Args:
        drawn: A draft for each row; rows may differ in length.
        hidden: The exit layer's hidden states of each row's last committed token and of all
            drafted ones but the last, (batch, g, d_model); None where no layer ran.
    """

    drawn: list[list[Drawn]]
    hidden: Tensor | None = None

    @property
    def tokens(self) -> list[list[int]]:
        """The drafted tokens."""
        return [[drawn.token for drawn in row] for row in self.drawn]


class Drafter(Protocol):
    """What the cycle needs of a strategy."""

    @property
    def name(self) -> str:
        """The strategy's name in tables."""
        ...

    @property
    def exit_layer(self) -> int:
        """Layers of the target that drafting runs (k); 0 for a strategy that runs none."""
        ...

    @property
    def cache_layers(self) -> int:
        """Layers that the strategy adds to the cache."""
        ...

    @property
    def margin(self) -> int:
        """The most tokens of a draft."""
        ...

    def observe(self, hidden: Tensor) -> None:
        """Take the exit layer's hidden states of the prompts: (batch, longest prompt, d_model).

        Only a strategy that adds layers to the cache is given them. What lies beyond a shorter
        prompt means nothing.
        """
        ...

    def draft(self, batch: Batch, limits: list[int]) -> Draft:
        """Propose tokens to follow each row's last one, at most `limits` of them."""
        ...

    def commit(self, hidden: Tensor | None, accepted: list[int]) -> None:
        """Learn what was accepted.

        Args:
            hidden: The exit layer's hidden states of the last committed token and of the whole
                draft, (batch, g + 1, d_model); None for a strategy without an exit layer.
            accepted: Drafted tokens that each row accepted.
        """
        ...

    def finish(self, tokens: int) -> None:
        """Learn that a reply has ended with so many tokens."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Forget all other rows, which have ended."""
        ...


@dataclass(frozen=True, slots=True)
class Autoregressive:
    """No draft: one pass of the whole model for each token.

    Args:
        exit_layer: Layers that run apart from the others, as they do for a drafter.
    """

    exit_layer: int = 0
    name: str = "autoregressive"
    cache_layers: int = 0
    margin: int = 0

    def observe(self, hidden: Tensor) -> None:
        """Nothing to learn."""

    def draft(self, batch: Batch, limits: list[int]) -> Draft:  # noqa: ARG002
        """Propose nothing."""
        return Draft([[] for _ in batch.last])

    def commit(self, hidden: Tensor | None, accepted: list[int]) -> None:
        """Nothing to learn."""

    def finish(self, tokens: int) -> None:
        """Nothing to learn."""

    def keep(self, rows: list[int]) -> None:
        """Nothing to forget."""


@dataclass(slots=True)
class PromptLookup:
    """Propose what followed the last tokens where they stood before (Saxena 2023).

    Args:
        margin: The most tokens of a draft.
        ngram: The longest run of last tokens to look for.
    """

    margin: int = 10
    ngram: int = 3
    name: str = "lookup"
    exit_layer: int = 0
    cache_layers: int = 0

    def observe(self, hidden: Tensor) -> None:
        """Nothing to learn."""

    def draft(self, batch: Batch, limits: list[int]) -> Draft:
        """Propose what followed the longest and latest earlier occurrence."""
        return Draft(
            [
                [Drawn(token) for token in self.look_up(history, min(self.margin, limit))]
                for history, limit in zip(batch.history, limits, strict=True)
            ]
        )

    def look_up(self, history: list[int], most: int) -> list[int]:
        """Return at most `most` tokens that followed the last ones where they stood before."""
        if not most:
            return []
        for size in range(min(self.ngram, len(history) - 1), 0, -1):
            pattern = history[-size:]
            for start in range(len(history) - size - 1, -1, -1):
                if history[start : start + size] == pattern:
                    return history[start + size : start + size + most]
        return []

    def commit(self, hidden: Tensor | None, accepted: list[int]) -> None:
        """Nothing to learn."""

    def finish(self, tokens: int) -> None:
        """Nothing to learn."""

    def keep(self, rows: list[int]) -> None:
        """Nothing to forget."""


@dataclass(slots=True)
class SelfSpeculative:
    """Draft with the target's first layers, an imitation network and the shared LM head.

    Without a network this is early exit: the final norm and LM head on the exit layer's states.

    Args:
        decoder: The target.
        exit_layer: Layers of the target that draft (k).
        network: The imitation network, or None for early exit.
        length: How long a draft goes on.
        name: The strategy's name in tables.
    """

    decoder: SplitDecoder
    exit_layer: int
    network: ImitationNetwork | None = None
    length: DraftLength = field(default_factory=FixedLength)
    name: str = "imitation"
    margin: int = field(init=False)
    cache_layers: int = field(init=False)
    clock: Callable[[], float] = time.perf_counter
    _head: Tensor | None = field(init=False, default=None)
    _loop: TokenByToken = field(init=False)
    _prompts: Tensor | None = field(init=False, default=None)
    """States of the prompts that the network has not seen."""
    _pending: list[Tensor] = field(init=False, default_factory=list)
    """States of the positions before the last token that the network has not seen."""

    def __post_init__(self) -> None:
        """Cut the head to the draft's vocabulary.

        Raises:
            InputError: The exit layer is not one of the target's.
        """
        if not 1 <= self.exit_layer < self.decoder.depth:
            raise InputError(
                f"The exit layer lies between 1 and {self.decoder.depth - 1} for this model;"
                f" got {self.exit_layer}."
            )
        self.margin = self.length.maximum
        self.cache_layers = 0 if self.network is None else self.network.cache_layers
        self._loop = TokenByToken(self.length, self.clock, self.vocabulary)
        if self.vocabulary is not None:
            self._head = self.decoder.head_rows(self.vocabulary).detach().contiguous()

    @property
    def vocabulary(self) -> Tensor | None:
        """The tokens that can be drafted, or None for all."""
        return None if self.network is None else self.network.draft_vocabulary

    def observe(self, hidden: Tensor) -> None:
        """Keep the prompts' states for the first draft; a short reply may never ask for one."""
        self._prompts, self._pending = hidden, []

    def draft(self, batch: Batch, limits: list[int]) -> Draft:
        """Draft token by token, until the rule for the draft's length ends it."""
        starts = batch.cache.lengths
        states: list[Tensor] = []

        def guess(last: list[int], step: int) -> Tensor:
            span = batch.cache.span([start + step for start in starts], 1)
            x = self.decoder.embed(torch.tensor(last, device=self.decoder.device)[:, None])
            x = self.decoder.run(x, span, batch.cache, range(self.exit_layer))
            states.append(x)
            return self.head(self.imitate(x, span, batch))[:, -1]

        behind = len(self._pending) + (0 if self._prompts is None else self._prompts.shape[1])
        drafts = self._loop.draft(batch, limits, behind, guess)
        return Draft(drafts, torch.cat(states, 1) if states else None)

    def imitate(self, x: Tensor, span: Span, batch: Batch) -> Tensor:
        """Return the network's guess of the last layer's states: (batch, 1 or more, d_model)."""
        if self.network is None:
            return x
        cache, decoder = batch.cache, self.decoder
        if self._prompts is not None:
            whole = cache.span([0] * len(x), self._prompts.shape[1])
            self.network.run(self._prompts, whole, cache, decoder)
            self._prompts = None
        if self._pending:
            before = len(self._pending)
            span = cache.span([start - before for start in span.starts], before + 1)
            x = torch.cat((*self._pending, x), 1)
            self._pending = []
        return self.network.run(x, span, cache, decoder)

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of the last position: (batch, 1, draft vocabulary)."""
        x = x[:, -1:]
        if self._head is None:
            return self.decoder.head(x)
        return F.linear(self.decoder.norm(x), self._head)

    def commit(self, hidden: Tensor | None, accepted: list[int]) -> None:
        """Keep the hidden state before the new last token, which the network may not have seen.

        It has not, where there was no draft or the whole of it was accepted. Where it has, it
        computes the same again.
        """
        self._loop.commit(accepted)
        if not self.cache_layers or hidden is None:
            return
        if len(accepted) == 1:
            state = hidden[:, accepted[0] : accepted[0] + 1]
        else:
            rows = torch.arange(len(accepted), device=hidden.device)
            state = hidden[rows, torch.tensor(accepted, device=hidden.device)][:, None]
        self._pending.append(state)

    def finish(self, tokens: int) -> None:
        """Tell the rule for the draft's length how long a reply was."""
        self.length.finish(tokens)

    def keep(self, rows: list[int]) -> None:
        """Forget the states of all other rows."""
        self._pending = [states[rows] for states in self._pending]
        if self._prompts is not None:
            self._prompts = self._prompts[rows]
