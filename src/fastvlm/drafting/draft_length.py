"""How long a draft goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fastvlm.functional.errors import InputError


class DraftLength(Protocol):
    """Decides, token by token, whether a draft goes on."""

    @property
    def maximum(self) -> int:
        """The most tokens that one draft may have."""
        ...

    @property
    def reads_confidence(self) -> bool:
        """Whether `goes_on` needs the drafter's probability; computing it costs a little."""
        ...

    def goes_on(self, drafted: int, confidence: float) -> bool:
        """Return whether to draft another token.

        Args:
            drafted: Tokens drafted in this cycle so far.
            confidence: The drafter's own probability of the last one, or 1 if it isn't read.
        """
        ...


def _checked(maximum: int) -> None:
    if maximum < 1:
        raise InputError(f"A draft has at least one token; got num_speculative_tokens {maximum}.")


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Every draft has the same number of tokens."""

    maximum: int = 8
    reads_confidence = False

    def __post_init__(self) -> None:
        _checked(self.maximum)

    def goes_on(self, drafted: int, confidence: float) -> bool:  # noqa: ARG002
        """Go on up to the maximum."""
        return drafted < self.maximum


@dataclass(frozen=True, slots=True)
class ConfidenceLength:
    """A draft ends after the first token that the drafter is unsure of.

    Args:
        maximum: The most tokens in a draft.
        threshold: A token with a probability below it is the draft's last.
    """

    maximum: int = 24
    threshold: float = 0.6
    reads_confidence = True

    def __post_init__(self) -> None:
        _checked(self.maximum)
        if not 0 <= self.threshold <= 1:
            raise InputError(f"A confidence threshold lies between 0 and 1; got {self.threshold}.")

    def goes_on(self, drafted: int, confidence: float) -> bool:
        """Go on while the drafter is sure, up to the maximum."""
        return drafted < self.maximum and confidence >= self.threshold


def draft_length(maximum: int, confidence: float) -> DraftLength:
    """Return drafts that end at a confidence, or of fixed length where it is 0."""
    return ConfidenceLength(maximum, confidence) if confidence else FixedLength(maximum)
