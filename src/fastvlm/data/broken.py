"""Broken records: they are skipped and counted, and too many of them stop the run."""

from __future__ import annotations

from typing import Any

from fastvlm.data.conversations import Broken
from fastvlm.functional.errors import InputError

MAX_BROKEN_SHARE = 0.05
"""The default maximum share of broken records."""
MAX_NAMED_RECORDS = 5
"""The maximum number of broken records that are named; the others are only counted."""


class BrokenRecords:
    """Counts the records that a run has seen, and how many of them were broken.

    Args:
        share: The maximum share of broken records, from 0 to 1.
        least: The number of records to see before the share is checked.
        what: What the records are called in messages.
        failed: What is said of broken records in messages.

    Raises:
        InputError: The share is not between 0 and 1.
    """

    def __init__(
        self,
        share: float = MAX_BROKEN_SHARE,
        least: int = 100,
        *,
        what: str = "records",
        failed: str = "are broken",
    ) -> None:
        self.what, self.failed = what, failed
        if not 0 <= share <= 1:
            raise InputError(f"The share of broken records lies between 0 and 1; got {share}.")
        self.share, self.least = share, least
        self.seen = self.count = 0
        self.named: list[Broken] = []

    def see(self) -> None:
        """Count a record as seen, broken or not."""
        self.seen += 1

    def add(self, broken: Broken) -> None:
        """Count a record as broken that was counted as seen.

        Raises:
            InputError: The share of broken records exceeds the maximum.
        """
        self.count += 1
        if len(self.named) < MAX_NAMED_RECORDS and broken not in self.named:
            self.named.append(broken)
        if self.seen >= self.least:
            self.check()

    def check(self) -> None:
        """Check the share of broken records, however few were seen.

        Raises:
            InputError: It exceeds the maximum.
        """
        if self.count > self.share * self.seen:
            raise InputError(
                f"{self.summary()}, and a run goes on with at most {100 * self.share:.3g} %."
            )

    def summary(self) -> str:
        """Return how many records were broken, and the reasons of the first few."""
        if not self.count:
            return f"None of {self.seen:,} {self.what} {self.failed.replace('are ', 'is ')}"
        first = "; ".join(f"{one.name}: {one.reason.rstrip('.')}" for one in self.named)
        others = "; ..." if self.count > len(self.named) else ""
        share = 100 * self.count / self.seen
        return (
            f"{self.count:,} of {self.seen:,} {self.what} ({share:.3g} %) {self.failed}"
            f" ({first}{others})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, in plain types."""
        named = [(broken.name, broken.reason) for broken in self.named]
        return {"seen": self.seen, "count": self.count, "named": named}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.seen, self.count = state["seen"], state["count"]
        self.named = [Broken(name, reason) for name, reason in state["named"]]
