"""Running estimates of what a cycle's parts take on this machine, robust to noise."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 15
"""Measurements of which the median is taken: one that something else disturbed does not count."""
ORDINARY_WINDOW = 7
"""Ordinary steps are rare while drafting pays, and must not be out of date."""
DECAY = 0.96
ENOUGH = 3.0
"""Passes after which one that takes much longer than the others is taken for disturbed."""
PRIOR = 4.0
"""Weight of what is assumed of the slope before it is measured, in squared tokens' width."""
TYPICAL_SLOPE = 0.03
"""What another token adds to a verify, in ordinary steps, until it is measured."""


class Recent:
    """The median of the last measurements."""

    def __init__(self, window: int = WINDOW) -> None:
        self.values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> None:
        """Take another measurement."""
        self.values.append(value)

    @property
    def median(self) -> float:
        """The median, or 0 where nothing was measured."""
        return statistics.median(self.values) if self.values else 0.0


class VerifyCost:
    """Seconds of a pass of the full model by its width.

    An ordinary step (width 1) stands alone: it is bound by reading the weights, and is computed by
    other routines. From width 2 on the seconds are a straight line, a decayed least-squares fit.
    """

    def __init__(self) -> None:
        self.ordinary = Recent(ORDINARY_WINDOW)
        self._weight = self._width = self._seconds = 0.0
        self._variance = self._covariance = 0.0

    def add(self, width: int, seconds: float) -> None:
        """Take a pass's measurement."""
        if width == 1:
            self.ordinary.add(seconds)
            return
        if self._weight > ENOUGH:
            # What disturbs a pass must not bend the line; what lasts moves it all the same.
            seconds = min(seconds, 1.5 * self.of(width))
        # Welford's update of a weighted mean and of the products about it, with forgetting.
        self._weight = DECAY * self._weight + 1
        share = 1 / self._weight
        off = width - self._width
        self._width += share * off
        self._variance = DECAY * self._variance + (1 - share) * off * off
        late = seconds - self._seconds
        self._seconds += share * late
        self._covariance = DECAY * self._covariance + (1 - share) * off * late

    @property
    def slope(self) -> float:
        """Seconds that another token adds to a pass of two and more."""
        base = self.ordinary.median or self._seconds
        found = (self._covariance + PRIOR * TYPICAL_SLOPE * base) / (self._variance + PRIOR)
        # A token beside others never costs more than a pass of its own.
        return min(max(found, 0.0), base)

    def of(self, width: float) -> float:
        """Return the seconds of a pass."""
        if width <= 1:
            return self.ordinary.median
        if not self._weight:
            return self.ordinary.median * (1 + TYPICAL_SLOPE * (width - 1))
        return max(self._seconds + self.slope * (width - self._width), 0.0)


class CycleCosts:
    """What drafting and verifying take for batches of one size."""

    def __init__(self) -> None:
        self.verify = VerifyCost()
        self.step = Recent()
        self._extra = Recent()
        self._behind = Recent()

    def add(self, steps: list[float], behind: int, width: int, verify: float) -> None:
        """Take a cycle's measurements, in seconds.

        Args:
            steps: Each draft step.
            behind: Positions on which the first step caught up.
            width: The verify's width.
            verify: The verify's seconds.
        """
        self.verify.add(width, verify)
        for number, seconds in enumerate(steps):
            # The first step of a draft always looks one position back.
            if number or behind <= 1:
                self.step.add(seconds)
            elif self.step.values:
                self._extra.add(max(seconds - self.step.median, 0.0))
                self._behind.add(behind)

    def catch_up(self, behind: int) -> float:
        """Return the seconds of seeing positions that were not seen yet.

        Fewer than usual take as long as usual, more in proportion.
        """
        usual = self._behind.median
        return self._extra.median * max(behind / usual, 1.0) if behind > 1 and usual else 0.0
