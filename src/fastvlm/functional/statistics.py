"""Statistics of decoding: timings and acceptance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodingStatistics:
    """Timings and acceptance of one reply.

    Args:
        tokens: Tokens of the reply, its end token included.
        ttft_ms: Time to first token, image included, in milliseconds; NaN before there is one.
        tpot_ms: Time per output token after the first, in milliseconds; None for one token.
        cycles: Passes of the full model after the prefill.
        proposed: Drafted tokens.
        accepted: Drafted tokens that were accepted.
    """

    tokens: int
    ttft_ms: float
    tpot_ms: float | None
    cycles: int
    proposed: int
    accepted: int

    @property
    def total_ms(self) -> float:
        """Time to the last token, in milliseconds."""
        return self.ttft_ms + (self.tpot_ms or 0.0) * (self.tokens - 1)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens per drafted one; None where nothing was drafted."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per cycle, the target's own counted; None where there was no cycle."""
        return (self.tokens - 1) / self.cycles if self.cycles else None

    @classmethod
    def of(
        cls,
        started: float,
        times: Sequence[float],
        proposed: Sequence[int],
        accepted: Sequence[int],
    ) -> DecodingStatistics:
        """Return the statistics of a reply.

        Args:
            started: When its work began, in seconds.
            times: When each of its tokens was known, in seconds.
            proposed: Drafted tokens of each cycle.
            accepted: Accepted tokens of each cycle.
        """
        span = times[-1] - times[0] if times else 0.0
        return cls(
            tokens=len(times),
            ttft_ms=1e3 * (times[0] - started) if times else math.nan,
            tpot_ms=1e3 * span / (len(times) - 1) if len(times) > 1 else None,
            cycles=len(proposed),
            proposed=sum(proposed),
            accepted=sum(accepted),
        )


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Acceptance over several replies together.

    Args:
        rate: Accepted tokens per drafted token; None where nothing was drafted.
        length: Tokens per pass of the full model, the target's own included; None where there was
            no pass after the prefills.
        draft_length: Drafted tokens per such pass; None where nothing was drafted.
    """

    rate: float | None
    length: float | None
    draft_length: float | None

    @classmethod
    def over(cls, replies: Collection[DecodingStatistics]) -> Acceptance:
        """Return the acceptance over replies, each weighted by its number of cycles."""
        cycles = sum(reply.cycles for reply in replies)
        proposed = sum(reply.proposed for reply in replies)
        return cls(
            sum(reply.accepted for reply in replies) / proposed if proposed else None,
            sum(reply.tokens - 1 for reply in replies) / cycles if cycles else None,
            proposed / cycles if proposed else None,
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the median and the quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)
