"""The strategies: ways of drafting that share one engine. None holds a request's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.draft_loop import Draft, draft_loop
from fastvlm.decoding.lookup import Lookup
from fastvlm.drafting.draft_length import DraftLength, FixedLength


class Strategy(Protocol):
    """A way of drafting.

    One strategy may serve any number of requests at once, so the state of each request is in its
    slot.
    """

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
    def max_draft_tokens(self) -> int:
        """The most tokens of a draft."""
        ...

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """Propose tokens to follow each row's last one.

        Args:
            batch: The slots, a row each.
            limits: The maximum number of tokens to draft for each row.
        """
        ...

    def on_verified(self, draft: Draft, accepted: Sequence[int], now: float) -> None:
        """Update the strategy's estimates after a verify.

        Args:
            draft: The draft.
            accepted: The number of drafted tokens that each row accepted.
            now: When the verify ended, in seconds of the batch's clock.
        """
        ...

    def on_finish(self, tokens: int) -> None:
        """Update the strategy's estimates after a reply of so many tokens."""
        ...


class Drafting:
    """A strategy that keeps no estimates."""

    def on_verified(self, draft: Draft, accepted: Sequence[int], now: float) -> None:
        """Do nothing. See `Strategy.on_verified`."""

    def on_finish(self, tokens: int) -> None:
        """Do nothing. See `Strategy.on_finish`."""


class RuledDrafting:
    """A strategy whose draft length is decided by a rule, which adapts to what is accepted."""

    length: DraftLength

    def on_verified(self, draft: Draft, accepted: Sequence[int], now: float) -> None:
        """Update the rule for the draft length. See `Strategy.on_verified`."""
        progress = draft.progress
        if progress is None or (draft.forced and not progress.tokens):
            # With forced tokens alone it was neither a draft of this drafter nor an ordinary step.
            return
        # A drafter's own tokens, and copied ones, come before the forced ones.
        own = [
            min(count, len(drafted) + len(copied))
            for count, drafted, copied in zip(
                accepted, progress.confidences, progress.copied, strict=True
            )
        ]
        self.length.update(progress, own, draft.timings(now))

    def on_finish(self, tokens: int) -> None:
        """Update the rule for the draft length. See `Strategy.on_finish`."""
        self.length.on_finish(tokens)


@dataclass(frozen=True, eq=False)
class Autoregressive(Drafting):
    """No draft: one pass of the whole model for each token.

    Args:
        exit_layer: Layers that run in a pass of their own, as they do with a strategy that drafts.
    """

    exit_layer: int = 0
    name: str = "autoregressive"
    cache_layers: int = 0
    max_draft_tokens: int = 0

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:  # noqa: ARG002
        """Propose nothing."""
        return Draft([[] for _ in batch.slots])


@dataclass(eq=False)
class PromptLookup(RuledDrafting):
    """Propose the tokens that followed an earlier occurrence of the last tokens (Saxena 2023).

    Args:
        length: The rule for the draft length.
        lookup: What looks for earlier occurrences.
        name: The strategy's name in tables.
    """

    length: DraftLength = field(default_factory=lambda: FixedLength(10))
    lookup: Lookup = field(default_factory=Lookup)
    name: str = "prompt-lookup"
    exit_layer: int = field(init=False, default=0)
    cache_layers: int = field(init=False, default=0)

    @property
    def max_draft_tokens(self) -> int:
        """The most tokens of a draft."""
        return self.length.maximum

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """Propose the tokens that followed the longest and latest earlier occurrence."""
        return draft_loop(batch, self.length, limits, None, self.lookup)
