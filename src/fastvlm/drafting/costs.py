"""Running estimates of what a cycle's parts take on this machine, robust to noise."""

from __future__ import annotations

import statistics
from collections import deque
from itertools import chain, islice

WINDOW = 15
"""Measurements of which the median is taken: one that something else disturbed does not count."""
ORDINARY_WINDOW = 7
"""Ordinary steps are rare while drafting pays, and must not be out of date."""
SETTLED = 3
"""Draft steps after which another takes no longer and no less: the first ones find caches that the
verify has emptied."""
NEIGHBOURS = 4
"""Earlier passes that a pass is held against for the slope: further back the machine's load was
another."""
SLOPES = 60
"""Pairs of passes of which the slope is the median,"""
PRIOR = 12.0
"""beside what is assumed of it, with the weight of a pair so many tokens apart."""
TYPICAL_SLOPE = 0.03
"""What another token adds to a verify, in ordinary steps, until it is measured."""
WIDE = 6
"""Passes from this width on tell of the slope, beside an ordinary step."""


class Recent:
    """The median of the last measurements; 0 where nothing was measured."""

    def __init__(self, window: int = WINDOW) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.median = 0.0

    def add(self, value: float) -> None:
        """Take another measurement."""
        self.values.append(value)
        # It is asked for much more often, in the middle of drafts.
        self.median = statistics.median(self.values)


class StepCost:
    """Seconds of a draft step by its place in the draft, from 0 on."""

    def __init__(self) -> None:
        self.places = [Recent() for _ in range(SETTLED + 1)]

    def add(self, place: int, seconds: float) -> None:
        """Take a step's measurement."""
        self.places[min(place, SETTLED)].add(seconds)

    def of(self, place: int) -> float:
        """Return the seconds of a step: no more than those of any before it.

        Short drafts measure the first steps only, and what is known of later ones gets out of date.
        """
        known = [recent.median for recent in self.places[: place + 1] if recent.values]
        return min(known, default=0.0)

    def of_all(self, steps: float) -> float:
        """Return the seconds of the first steps, so many on average."""
        early = sum(self.of(place) * min(max(steps - place, 0.0), 1.0) for place in range(SETTLED))
        return early + self.of(SETTLED) * max(steps - SETTLED, 0.0)


class VerifyCost:
    """Seconds of a pass of the full model by its width.

    An ordinary step (width 1) stands alone: it is bound by reading the weights, and is computed by
    other routines. From width 2 on the seconds are a straight line. Its slope is the median of
    those between passes that followed one another (after Theil and Sen), each counted by how far
    apart their widths are, so that neither single passes nor a change of the load bend it.
    """

    def __init__(self) -> None:
        self.ordinary = Recent(ORDINARY_WINDOW)
        self.slope = 0.0
        """Seconds that another token adds to a pass of two and more."""
        self._at_nothing = 0.0
        """The line's seconds at width 0."""
        self._passes: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._slopes: deque[tuple[float, int]] = deque(maxlen=SLOPES)

    def add(self, width: int, seconds: float) -> None:
        """Take a pass's measurement."""
        if width == 1:
            self.ordinary.add(seconds)
            if len(self.ordinary.values) > 1:
                # It bears on what is assumed only; where nothing pays, all passes are such.
                return
        else:
            for other, taken in islice(reversed(self._passes), NEIGHBOURS):
                if apart := width - other:
                    self._slopes.append(((seconds - taken) / apart, abs(apart)))
            self._passes.append((width, seconds))
        base = self.ordinary.median or self._passes[-1][1]
        # A token beside others never costs more than a pass of its own.
        self.slope = min(max(self._middle_slope(base), 0.0), base)
        if self._passes:
            self._at_nothing = statistics.median(
                taken - self.slope * other for other, taken in self._passes
            )
        else:
            self._at_nothing = base - self.slope

    def of(self, width: float) -> float:
        """Return the seconds of a pass."""
        if width <= 1:
            return self.ordinary.median
        return max(self._at_nothing + self.slope * width, 0.0)

    def _middle_slope(self, base: float) -> float:
        """Return the median of the slopes and what is assumed, by their weights."""
        pairs = sorted(chain(self._slopes, [(self._assumed(base), PRIOR)]))
        half = sum(weight for _, weight in pairs) / 2
        for slope, weight in pairs:
            half -= weight
            if half <= 0:
                return slope
        return pairs[-1][0]

    def _assumed(self, base: float) -> float:
        """Return the slope to assume: that from an ordinary step to wide passes, or a typical one.

        From the ordinary step to a narrow pass it is much too steep: other routines compute it.
        Who believed it would draft a token at a time, and never see another slope.
        """
        wide = [(taken - base) / (width - 1) for width, taken in self._passes if width >= WIDE]
        return statistics.median(wide) if wide and self.ordinary.values else TYPICAL_SLOPE * base


class CycleCosts:
    """What drafting and verifying take for batches of one size."""

    def __init__(self) -> None:
        self.verify = VerifyCost()
        self.step = StepCost()
        self._extra = Recent()
        self._lag = Recent()

    def add(self, steps: list[float], lag: int, width: int, verify: float) -> None:
        """Take a cycle's measurements, in seconds.

        Args:
            steps: Each draft step.
            lag: Positions on which the first step caught up.
            width: The verify's width.
            verify: The verify's seconds.
        """
        self.verify.add(width, verify)
        for place, seconds in enumerate(steps):
            # The first step of a draft always looks one position back.
            if place or lag <= 1:
                self.step.add(place, seconds)
            elif usual := self.step.of(0):
                self._extra.add(max(seconds - usual, 0.0))
                self._lag.add(lag)

    def catch_up(self, lag: int) -> float:
        """Return the seconds of seeing positions that were not seen yet.

        Fewer than usual take as long as usual, more in proportion.
        """
        usual = self._lag.median
        return self._extra.median * max(lag / usual, 1.0) if lag > 1 and usual else 0.0
