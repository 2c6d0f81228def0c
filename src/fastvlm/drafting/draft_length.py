"""How long a draft goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fastvlm.functional.errors import InputError


@dataclass(slots=True)
class Progress:
    """The state of one cycle's drafts: a value for each row of the batch.

    Args:
        active: Whether the row can have another token: it decodes, its limit is not reached, and
            its last drafted token does not end the reply.
        confidences: The drafter's own probability of each token drafted so far (1 where the rule
            does not read it).
        remaining: The maximum number of tokens that the reply can still have.
        generated: Tokens of the reply so far.
        lag: Positions before the last committed token that a drafter has not seen yet and has to
            process before its first guess.
        ahead: Whether the next token is drafted already, together with the one before.
        copied: The lengths of the matches before each token that was copied (prompt lookup), after
            the drafter's own.
        chances: For a rule to keep how likely each row's draft is accepted: tokens, and the chance.
    """

    active: list[bool]
    confidences: list[list[float]]
    remaining: list[int]
    generated: list[int]
    lag: int = 0
    ahead: bool = False
    copied: list[list[int]] = field(init=False)
    chances: list[tuple[int, float]] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing copied."""
        self.copied = [[] for _ in self.active]
        self.chances = [(0, 1.0)] * len(self.active)

    @property
    def steps(self) -> int:
        """Draft steps taken so far: tokens of the longest draft."""
        return max(map(len, self.confidences), default=0)

    @property
    def tokens(self) -> int:
        """Tokens of the longest draft, with those that it copies."""
        return max(len(c) + len(m) for c, m in zip(self.confidences, self.copied, strict=True))


class Offer(NamedTuple):
    """Tokens of one row that could be copied from what came before.

    Args:
        tokens: The number of tokens; 0 for none.
        match: The number of last tokens that are the same where they are copied from.
    """

    tokens: int = 0
    match: int = 1


@dataclass(frozen=True, slots=True)
class Timings:
    """The time of each part of a cycle, in seconds.

    Args:
        steps: Each draft step; the first one includes positions that the drafter had not seen.
        verify: The verify pass.
        step: What a step took where several were run together, those included whose tokens were
            dropped; None where each was timed by itself.
    """

    steps: list[float]
    verify: float
    step: float | None = None


class DraftLength(Protocol):
    """Decides, token by token, whether drafts go on."""

    @property
    def maximum(self) -> int:
        """The most tokens that one draft may have."""
        ...

    @property
    def reads_confidence(self) -> bool:
        """Whether the rule needs the drafter's probability; computing it costs a little."""
        ...

    def rests(self, rows: int, /, *, lag: int | None) -> bool:
        """Return whether a cycle without copies is an ordinary step that isn't measured either.

        Nothing else of the rule is asked in such a cycle.

        Args:
            rows: The rows of the batch.
            lag: See `Progress.lag`; None where there is nothing but copies.
        """
        ...

    def should_continue(self, progress: Progress) -> list[bool]:
        """Return whether each row drafts another token; it is asked before the first one too."""
        ...

    def should_copy(self, progress: Progress, offers: Sequence[Offer]) -> list[int]:
        """Return how many offered tokens each row copies; they end the draft. All 0: it goes on.

        Args:
            progress: The cycle's drafts.
            offers: What each row could copy.
        """
        ...

    def update(self, progress: Progress, accepted: Sequence[int], timings: Timings) -> None:
        """Update the rule's estimates after a cycle.

        Args:
            progress: The cycle's drafts.
            accepted: The number of tokens that each row accepted, of those that were drafted and
                those that were copied.
            timings: The time of each part of the cycle, in seconds.
        """
        ...

    def on_finish(self, tokens: int) -> None:
        """Update the rule's estimates after a reply of so many tokens."""
        ...


class RowByRow:
    """A rule that decides for each row alone and keeps no estimates."""

    maximum: int

    def continues(self, confidences: list[float]) -> bool:
        """Return whether a row's draft goes on after tokens with these probabilities."""
        return len(confidences) < self.maximum

    def rests(self, _rows: int, /, *, lag: int | None) -> bool:
        """Return whether there is nothing to draft with."""
        return lag is None

    def should_continue(self, progress: Progress) -> list[bool]:
        """Return whether each row drafts another token."""
        return [
            is_active and self.continues(confidences)
            for is_active, confidences in zip(progress.active, progress.confidences, strict=True)
        ]

    def should_copy(self, progress: Progress, offers: Sequence[Offer]) -> list[int]:
        """Copy all that there is, up to the maximum."""
        return [
            min(offer.tokens, self.maximum - len(confidences))
            for offer, confidences in zip(offers, progress.confidences, strict=True)
        ]

    def update(self, progress: Progress, accepted: Sequence[int], timings: Timings) -> None:
        """Do nothing. See `DraftLength.update`."""

    def on_finish(self, tokens: int) -> None:
        """Do nothing. See `DraftLength.on_finish`."""


def check_maximum(maximum: int) -> None:
    """Refuse drafts without a token.

    Raises:
        InputError: The maximum is below 1.
    """
    if maximum < 1:
        raise InputError(f"A draft has at least one token; got num_speculative_tokens {maximum}.")


@dataclass(frozen=True)
class FixedLength(RowByRow):
    """Every draft has the same number of tokens."""

    maximum: int = 8
    reads_confidence: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        check_maximum(self.maximum)


@dataclass(frozen=True)
class ConfidenceLength(RowByRow):
    """A draft ends after the first token that the drafter is unsure of.

    Args:
        maximum: The maximum number of tokens in a draft.
        threshold: The probability below which a token ends the draft.
    """

    maximum: int = 24
    threshold: float = 0.6
    reads_confidence: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        check_maximum(self.maximum)
        if not 0 <= self.threshold <= 1:
            raise InputError(f"A confidence threshold lies between 0 and 1; got {self.threshold}.")

    def continues(self, confidences: list[float]) -> bool:
        """Return whether the drafter is sure of all tokens and the maximum is not reached."""
        return super().continues(confidences) and (
            not confidences or confidences[-1] >= self.threshold
        )
