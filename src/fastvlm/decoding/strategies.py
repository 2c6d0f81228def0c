"""The strategies: ways of drafting that share one engine."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm.decoding.selection import Drawn, Selection
from fastvlm.drafting.draft_length import DraftLength, FixedLength
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.language.cache import DecoderCache, Span
from fastvlm.language.decoder import SplitDecoder


@dataclass(slots=True)
class Batch:
    """The rows being decoded, as drafters see them.

    Args:
        decoder: The target.
        cache: Its cache, whose `lengths` are the positions already committed.
        last: Each row's last committed token, which the cache doesn't hold yet.
        history: All of each row's tokens, its prompt's and the last one included.
        replies: The reply in each of them.
        selections: How each row chooses its tokens.
        end_tokens: Tokens that end a reply.
        vocabulary_size: Logits of the target.
    """

    decoder: SplitDecoder
    cache: DecoderCache
    last: list[int]
    history: list[list[int]]
    replies: list[list[int]]
    selections: list[Selection]
    end_tokens: frozenset[int]
    vocabulary_size: int = 0

    @property
    def plain(self) -> bool:
        """Whether all rows take the likeliest token, and nothing else plays a part."""
        return all(selection.plain for selection in self.selections)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, which have ended."""
        self.cache.keep(rows)
        self.last = [self.last[row] for row in rows]
        self.history = [self.history[row] for row in rows]
        self.replies = [self.replies[row] for row in rows]
        self.selections = [self.selections[row] for row in rows]


@dataclass(slots=True)
class Draft:
    """What one cycle proposes.

    Args:
        tokens: A draft for each row; rows may differ in length.
        hidden: The exit layer's hidden states of each row's last committed token and of all
            drafted ones but the last, (batch, g, d_model); None where no layer ran.
        q: The distribution that each token was drawn from, (vocabulary,), or None for a token that
            was not drawn; None for all of them.
    """

    tokens: list[list[int]]
    hidden: Tensor | None = None
    q: list[list[Tensor | None]] | None = None


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
    def cache_owner(self) -> Hashable:
        """Whose those layers are; None for a strategy that adds none."""
        ...

    @property
    def margin(self) -> int:
        """The most tokens of a draft."""
        ...

    def observe(self, hidden: Tensor, span: Span, batch: Batch) -> None:
        """Take the exit layer's hidden states of the prompts: (batch, span.width, d_model)."""
        ...

    def draft(self, batch: Batch, limits: list[int]) -> Draft:
        """Propose tokens to follow each row's last one, at most `limits` of them."""
        ...

    def commit(self, hidden: Tensor, accepted: list[int]) -> None:
        """Learn what was accepted.

        Args:
            hidden: The exit layer's hidden states of the last committed token and of the whole
                draft: (batch, g + 1, d_model).
            accepted: Drafted tokens that each row accepted.
        """
        ...

    def keep(self, rows: list[int]) -> None:
        """Forget all other rows, which have ended."""
        ...


class Autoregressive:
    """No draft: one pass of the whole model for each token."""

    name = "autoregressive"
    exit_layer = cache_layers = margin = 0
    cache_owner = None

    def observe(self, hidden: Tensor, span: Span, batch: Batch) -> None:
        """Nothing to learn."""

    def draft(self, batch: Batch, limits: list[int]) -> Draft:  # noqa: ARG002
        """Propose nothing."""
        return Draft([[] for _ in batch.last])

    def commit(self, hidden: Tensor, accepted: list[int]) -> None:
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
    cache_owner: None = None

    def observe(self, hidden: Tensor, span: Span, batch: Batch) -> None:
        """Nothing to learn."""

    def draft(self, batch: Batch, limits: list[int]) -> Draft:
        """Propose what followed the longest and latest earlier occurrence."""
        return Draft(
            [
                self.look_up(history, min(self.margin, limit)) if limit else []
                for history, limit in zip(batch.history, limits, strict=True)
            ]
        )

    def look_up(self, history: list[int], most: int) -> list[int]:
        """Return at most `most` tokens that followed the last ones where they stood before."""
        for size in range(min(self.ngram, len(history) - 1), 0, -1):
            pattern = history[-size:]
            for start in range(len(history) - size - 1, -1, -1):
                if history[start : start + size] == pattern:
                    return history[start + size : start + size + most]
        return []

    def commit(self, hidden: Tensor, accepted: list[int]) -> None:
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
    _head: Tensor | None = field(init=False, default=None)
    _before: Tensor | None = field(init=False, default=None)

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
        if self.vocabulary is not None:
            self._head = self.decoder.head_rows(self.vocabulary).detach().contiguous()

    @property
    def cache_owner(self) -> ImitationNetwork | None:
        """The network, where it has layers in the cache."""
        return self.network if self.cache_layers else None

    @property
    def vocabulary(self) -> Tensor | None:
        """The tokens that can be drafted, or None for all."""
        return None if self.network is None else self.network.draft_vocabulary

    def observe(self, hidden: Tensor, span: Span, batch: Batch) -> None:
        """Fill the network's cache with the prompts."""
        if self.network is not None and self.cache_layers:
            self.network.run(hidden, span, batch.cache, self.decoder)
        ends = zip(batch.cache.lengths, span.starts, strict=True)
        last = torch.tensor([length - start - 1 for length, start in ends], device=hidden.device)
        self._before = hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]

    def draft(self, batch: Batch, limits: list[int]) -> Draft:
        """Draft token by token until every row is unsure or full."""
        rows = len(batch.last)
        tokens: list[list[int]] = [[] for _ in range(rows)]
        q: list[list[Tensor | None]] = [[] for _ in range(rows)]
        going = [limit > 0 for limit in limits]
        starts, last = batch.cache.lengths, batch.last
        states: list[Tensor] = []
        while any(going):
            step = len(states)
            span = batch.cache.span([start + step for start in starts], 1)
            x = self.decoder.embed(torch.tensor(last, device=self.decoder.device)[:, None])
            x = self.decoder.run(x, span, batch.cache, range(self.exit_layer))
            states.append(x)
            scores = self.head(self.imitate(x, span, batch))[:, -1]
            proposed = self.choose(scores, batch, tokens, going)
            last = [found.token for found in proposed]
            for row, found in enumerate(proposed):
                if going[row]:
                    tokens[row].append(found.token)
                    q[row].append(found.q)
                    going[row] = (
                        found.token not in batch.end_tokens
                        and len(tokens[row]) < limits[row]
                        and self.length.goes_on(len(tokens[row]), found.confidence)
                    )
        return Draft(tokens, torch.cat(states, 1) if states else None, q)

    def imitate(self, x: Tensor, span: Span, batch: Batch) -> Tensor:
        """Return the network's guess of the last layer's states: (batch, 1 or 2, d_model)."""
        if self.network is None:
            return x
        if self.cache_layers and self._before is not None:
            # The network has not seen the last token of a draft that was accepted whole, so each
            # cycle begins one position back. Where it has seen it, it computes the same again.
            x = torch.cat((self._before, x), 1)
            span = batch.cache.span([start - 1 for start in span.starts], 2)
            self._before = None
        return self.network.run(x, span, batch.cache, self.decoder)

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of the last position: (batch, 1, draft vocabulary)."""
        x = x[:, -1:]
        if self._head is None:
            return self.decoder.head(x)
        return F.linear(self.decoder.norm(x), self._head)

    def choose(
        self, scores: Tensor, batch: Batch, tokens: list[list[int]], going: list[bool]
    ) -> list[Drawn]:
        """Return the next drafted token of each row that goes on, and any for the others.

        Args:
            scores: The drafter's logits, (batch, draft vocabulary).
            batch: The rows.
            tokens: What is drafted so far.
            going: Which rows go on.
        """
        if not batch.plain:
            return self.propose(scores, batch, tokens, going)
        if self.length.reads_confidence:
            top, best = scores.softmax(-1).max(-1)
            confidences = top.tolist()
        else:
            best = scores.argmax(-1)
            confidences = [1.0] * len(scores)
        found = best if self.vocabulary is None else self.vocabulary[best]
        return [
            Drawn(token, None, confidence)
            for token, confidence in zip(found.tolist(), confidences, strict=True)
        ]

    def propose(
        self, scores: Tensor, batch: Batch, tokens: list[list[int]], going: list[bool]
    ) -> list[Drawn]:
        """Do as `choose` does, where rows sample or have logits processors."""
        if self.vocabulary is not None:
            whole = scores.new_full((len(scores), batch.vocabulary_size), -torch.inf)
            scores = whole.index_copy(1, self.vocabulary, scores)
        found = []
        for row, selection in enumerate(batch.selections):
            reply = batch.replies[row] + tokens[row]
            drawn = selection.propose(reply, scores[row]) if going[row] else None
            # Processors may forbid all that can be drafted; any token is a lossless guess.
            found.append(drawn or Drawn(batch.last[row], None, 0.0))
        return found

    def commit(self, hidden: Tensor, accepted: list[int]) -> None:
        """Keep the hidden state before the new last token."""
        if len(accepted) == 1:
            self._before = hidden[:, accepted[0] : accepted[0] + 1]
            return
        rows = torch.arange(len(accepted), device=hidden.device)
        self._before = hidden[rows, torch.tensor(accepted, device=hidden.device)][:, None]

    def keep(self, rows: list[int]) -> None:
        """Forget the states of all other rows."""
        if self._before is not None:
            self._before = self._before[rows]
