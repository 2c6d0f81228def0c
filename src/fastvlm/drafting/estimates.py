"""Running estimates of what decoding takes: means, and the cost of a verify by its width."""

from __future__ import annotations

from dataclasses import dataclass, field

AVERAGED_CYCLES = 20
"""The number of cycles over which costs and gains are averaged: those of a few replies."""
OUTLIER_RATIO = 2
"""Times are limited to this multiple of the mean, as the machine may have been busy."""
SETTLED = 4
"""Verifies of a width beyond which it counts no more than other widths."""
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


class Duration(Mean):
    """A running mean of what something takes, in seconds."""

    def add(self, value: float) -> None:
        """Add what it took; of the first time, what is beyond the second one was preparation."""
        if self.weight == 1 and self.value > OUTLIER_RATIO * value:
            self.value, self.weight = 0.0, 0
        super().add(self.without_outlier(value))

    def without_outlier(self, value: float) -> float:
        """Return a time, limited to `OUTLIER_RATIO` times the mean."""
        return min(value, OUTLIER_RATIO * self.value) if self.weight else value


@dataclass(slots=True)
class _Widths:
    """Verifies of about one width: their means, and when the last one was."""

    width: Mean = field(default_factory=Mean)
    seconds: Duration = field(default_factory=Duration)
    last: int = 0
    is_first: bool = True
    """Whether there is only the first one, which also prepared the next ones: it tells nothing."""

    def add(self, width: int, seconds: float, now: int) -> None:
        self.last = now
        if self.is_first and self.seconds.weight:
            self.width, self.seconds, self.is_first = Mean(), Duration(), False
        self.seconds.add(seconds)
        self.width.add(width)


class VerifyCost:
    """What each further token adds to a verify, by least squares over widths.

    While widths hardly vary, it is near an even cost, which is more than it is: two tokens may cost
    much more than one, and further ones little. Widths are held apart by powers of two, and count
    alike once each has come a few times: a draft that has become short for a while still knows what
    long ones cost. A row's token adds as much in batches of all sizes, so they share what they
    measure.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, dict[int, _Widths]] = {}
        """By the rows of a batch, and the number of bits of the width."""
        self.verifies = 0

    def add(self, width: int, seconds: float, rows: int = 1) -> None:
        """Add the time of a verify of so many tokens in each row, in seconds."""
        self.verifies += 1
        place = (width - 1).bit_length()
        widths = self.sizes.setdefault(rows, {})
        widths.setdefault(place, _Widths()).add(width, seconds, self.verifies)

    def slope(self, even: float, rows: int = 1) -> float:
        """Return the seconds that each further token of all rows adds.

        Args:
            even: What it would be if each token that was verified had cost the same.
            rows: The rows of the batch.
        """
        covariance, variance = even / rows, 1.0
        for size, widths in self.sizes.items():
            known = [
                (min(one.seconds.weight, SETTLED), one.width.value, one.seconds.value)
                for one in widths.values()
                if self.verifies - one.last < EXPIRES_AFTER and not one.is_first
            ]
            if len(known) > 1:
                total = sum(weight for weight, _, _ in known)
                middle = sum(weight * width for weight, width, _ in known) / total
                for weight, width, seconds in known:
                    covariance += size * weight * (width - middle) * seconds
                    variance += size**2 * weight * (width - middle) ** 2
        return rows * covariance / variance
