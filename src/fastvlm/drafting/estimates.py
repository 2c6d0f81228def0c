"""Running estimates of what decoding takes: means, and the cost of a verify by its width."""

from __future__ import annotations

from dataclasses import dataclass, field

AVERAGED_CYCLES = 20
"""The number of cycles over which costs and gains are averaged: those of a few replies."""
OUTLIER_RATIO = 2
"""Times are limited to this multiple of the mean, as the machine may have been busy."""
EXPIRES_AFTER = 256
"""Verifies after which what was measured of another width no longer counts."""


class Mean:
    """A running mean.

    Args:
        window: The approximate number of latest values that it averages.
        value: The initial value.
        weight: The number of values that the initial value counts for.
    """

    def __init__(self, window: int = AVERAGED_CYCLES, value: float = 0.0, weight: int = 0) -> None:
        self.window, self.value, self.weight = window, value, weight

    def add(self, value: float) -> None:
        """Add a value."""
        self.weight = min(self.weight + 1, self.window)
        self.value += (value - self.value) / self.weight

    def without_outlier(self, value: float) -> float:
        """Return a value, limited to `OUTLIER_RATIO` times the mean."""
        return min(value, OUTLIER_RATIO * self.value) if self.weight else value


@dataclass(slots=True)
class _Widths:
    """Verifies of about one width: their means, and when the last one was."""

    width: Mean = field(default_factory=Mean)
    seconds: Mean = field(default_factory=Mean)
    last: int = 0
    is_first: bool = True
    """Whether there is only the first one, which also prepared the next ones."""

    def add(self, width: int, seconds: float, now: int) -> None:
        self.last = now
        if self.is_first and self.seconds.weight:
            self.width, self.seconds, self.is_first = Mean(), Mean(), False
        self.seconds.add(self.seconds.without_outlier(seconds))
        self.width.add(width)


class VerifyCost:
    """What each further token adds to a verify, by least squares over widths.

    While widths hardly vary, it is near an even cost, which is more than it is: two tokens may cost
    much more than one, and further ones little. Widths are held apart by powers of two, and each
    counts once, however often it comes: a draft that has become short for a while still knows what
    long ones cost.
    """

    def __init__(self) -> None:
        self.widths: dict[int, _Widths] = {}
        self.verifies = 0

    def add(self, width: int, seconds: float) -> None:
        """Add the time of a verify of so many tokens, in seconds."""
        self.verifies += 1
        place = (width - 1).bit_length()
        self.widths.setdefault(place, _Widths()).add(width, seconds, self.verifies)

    def slope(self, even: float) -> float:
        """Return the seconds that each further token adds.

        Args:
            even: What it would be if each token that was verified had cost the same.
        """
        known = [
            (one.width.value, one.seconds.value)
            for one in self.widths.values()
            if self.verifies - one.last < EXPIRES_AFTER
        ]
        if not known:
            return even
        middle = sum(width for width, _ in known) / len(known)
        average = sum(seconds for _, seconds in known) / len(known)
        covariance = sum((width - middle) * (seconds - average) for width, seconds in known)
        variance = sum((width - middle) ** 2 for width, _ in known)
        return (covariance + even) / (variance + 1)
