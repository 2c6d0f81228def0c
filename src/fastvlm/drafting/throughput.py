"""What decoding with drafts and without takes and brings, measured."""

from __future__ import annotations

import statistics
from copy import copy
from dataclasses import dataclass

from fastvlm.drafting.draft_length import Timings
from fastvlm.drafting.estimates import Duration, Mean, VerifyCost

BUDGET_STEPS = 8
"""Ordinary steps that drafting may lose: at first, and of what it has saved."""
PROBE_TIME_SHARE = 0.01
"""The share of ordinary steps' time that drafts may cost where they don't pay."""
PROBE_STEPS = 0.5
"""Ordinary steps to have saved, beyond what catching up takes, before drafts begin again: enough
for several in a row, as the first one tells little."""
AVERAGED_GAINS = 50
"""The number of cycles over which tokens are averaged: they vary more than times do."""
CLEAR_GAIN = 1.5
"""From what gain on it is clear that drafts pay, whatever the step before an ordinary one was."""
RESTS = 15
"""Ordinary steps between two that are measured, where drafts don't pay."""
MEASURE_ORDINARY_EVERY = 64
"""After drafts of how many ordinary steps' time one of these is measured again."""


@dataclass(slots=True)
class Budget:
    """What drafts, and copies that seem not to pay, may lose, in ordinary steps."""

    drafts: float = BUDGET_STEPS
    copies: float = BUDGET_STEPS

    def add_drafts(self, steps: float) -> None:
        """Add what drafts have gained, or lost."""
        self.drafts = min(max(self.drafts + steps, -BUDGET_STEPS), BUDGET_STEPS)

    def add_copies(self, steps: float) -> None:
        """Add what copies have gained, or lost."""
        self.copies = min(self.copies + steps, BUDGET_STEPS)


class Throughput:
    """Measured times and tokens of batches of one size.

    Args:
        budget: What drafts may lose.
        verifies: What is known of verifies of all sizes.
        rows: The rows of a batch.
    """

    def __init__(
        self, budget: Budget | None = None, verifies: VerifyCost | None = None, rows: int = 1
    ) -> None:
        self.step, self.ordinary = Duration(), Duration()
        self.verify, self.cycle = Duration(), Duration()
        """Seconds of a draft step, an ordinary step, a verify, and a whole cycle with a draft."""
        self.width, self.tokens = Mean(), Mean(AVERAGED_GAINS)
        """Tokens that a verify computes, and that a cycle with a draft brings."""
        self.caught_up, self.behind = Mean(), Mean()
        """Seconds that catching up took beyond a draft step, and positions that it computed."""
        self.verifies, self.rows = verifies or VerifyCost(), rows
        self._slope: float | None = None
        """Asked for several times in a cycle; None where it may have changed."""
        self.budget = budget or Budget()
        self.since_ordinary, self.ordinary_due = 0.0, 2
        """The time of drafts since an ordinary step was measured, and of those until the next one:
        in ordinary steps."""
        self._drafted, self._rested = False, 0
        """Whether the last step was a draft; ordinary steps since one was measured."""
        self._before: Duration | None = None
        """Where the last step was an ordinary one right after a draft: what was known before."""

    @property
    def slope(self) -> float:
        """Seconds that each further token adds to a verify."""
        if self._slope is None:
            self._slope = 0.0
            if self.ordinary.weight and self.verify.weight:
                beyond = (self.verify.value - self.ordinary.value) / (self.width.value - 1)
                slope = self.verifies.slope(beyond, self.rows)
                self._slope = min(max(slope, 0.0), self.ordinary.value)
        return self._slope

    @property
    def best(self) -> float:
        """Tokens per second with or without drafts, whichever is higher; 0 if neither is known."""
        rates = ((self.tokens.value, self.cycle.value), (1.0, self.ordinary.value))
        return max(tokens / seconds if seconds else 0.0 for tokens, seconds in rates)

    @property
    def is_measured(self) -> bool:
        """Whether steps with and without drafts have been measured."""
        return bool(self.ordinary.weight and self.cycle.weight)

    @property
    def pays(self) -> bool:
        """Whether drafts are faster than ordinary steps."""
        return self.tokens.value * self.ordinary.value > self.cycle.value

    def should_draft(self, *, pays: bool, lag: int) -> bool:
        """Return whether drafts pay or have a budget, and no ordinary step has to be measured.

        Args:
            pays: Whether they pay, as far as it is known.
            lag: See `Progress.lag`.
        """
        return (pays or self.budget.drafts >= self._stake(lag)) and not self.wants_ordinary

    def _stake(self, lag: int) -> float:
        """Return the ordinary steps that one may lose at least, to draft where it seems not to pay.

        Args:
            lag: See `Progress.lag`.
        """
        stake = 0.0 if self._drafted else PROBE_STEPS
        if self.behind.value and self.ordinary.value:
            each = max(self.caught_up.value, 0.0) / self.behind.value
            stake += lag * each / self.ordinary.value
        return min(stake, BUDGET_STEPS)

    @property
    def wants_ordinary(self) -> bool:
        """Whether an ordinary step has to be measured."""
        return self.since_ordinary >= self.ordinary_due

    def rests(self) -> bool:
        """Return whether an ordinary step need not be measured, as it was often and lately."""
        settled = self.ordinary.weight > RESTS and not self.wants_ordinary
        # What was measured right after a draft waits for the next one, see `add_ordinary`.
        if not settled or self._before is not None or self._rested == RESTS:
            self._rested = 0
            return False
        self._rested, self._drafted = self._rested + 1, False
        self._add_probing()
        return True

    def add_ordinary(self, seconds: float) -> None:
        """Add the time of a cycle without a draft, in seconds."""
        self._slope = None
        before, self._before = self._before, None
        if self._drafted:
            self._before = copy(self.ordinary)
        elif before is not None:
            # The first step after a draft takes longer, as other weights lie in the processor's
            # caches: often by a quarter. The next one counts in its place.
            self.ordinary = before
        self.ordinary.add(seconds)
        follows, self._drafted = not self._drafted, False
        gained = self.tokens.value * self.ordinary.value
        is_clear = self.cycle.weight and gained >= CLEAR_GAIN * self.cycle.value
        if not follows and not is_clear:
            # Whether to draft, or to copy, may depend on that, so another one is measured.
            return
        if self.since_ordinary:
            # At first after few drafts, then more rarely.
            self.ordinary_due = min(2 * self.ordinary_due, MEASURE_ORDINARY_EVERY)
        self.since_ordinary = 0.0
        self._add_probing()

    def _add_probing(self) -> None:
        """Allow for drafts and copies of a share of an ordinary step."""
        self.budget.add_drafts(PROBE_TIME_SHARE)
        self.budget.add_copies(PROBE_TIME_SHARE)

    def add_copy(self, tokens: float, copied: int, seconds: float) -> None:
        """Add a cycle with copies alone.

        Args:
            tokens: Tokens that a row gained, on average.
            copied: Tokens of the longest copy.
            seconds: The time of its verify.
        """
        if self.ordinary.value:
            # What the time would have brought otherwise, with or without draft steps.
            gain = tokens - self.verify.without_outlier(seconds) * self.best
            self.budget.add_copies(gain)
        self.add_verify(copied + 1, seconds)
        self._add_draft(seconds)

    def verify_of(self, width: int) -> float:
        """Return the seconds of a verify of so many tokens, as they are estimated."""
        known = self.verify if self.verify.weight else self.ordinary
        return known.value + self.slope * (width - (self.width.value or 1.0))

    def add_verify(self, width: int, seconds: float) -> None:
        """Add the time of a verify of so many tokens, in seconds."""
        self._slope = None
        self.verifies.add(width, seconds, self.rows)
        self.width.add(width)
        self.verify.add(seconds)

    def _add_draft(self, seconds: float) -> None:
        self.since_ordinary += seconds / self.ordinary.value if self.ordinary.value else 1.0
        self._drafted, self._before = True, None

    def add_draft(self, tokens: float, timings: Timings, copied: int = 0, lag: int = 0) -> None:
        """Add a cycle with draft steps.

        Args:
            tokens: Tokens that a row gained by them, on average.
            timings: The time of each part of the cycle, in seconds.
            copied: Tokens of the longest row beyond the draft steps: they were copied.
            lag: See `Progress.lag`.
        """
        known, is_first = self.step.value, not self.cycle.weight
        drafting = sum(timings.steps)
        if lag and known:
            computed = drafting / timings.step if timings.step else len(timings.steps)
            self.caught_up.add(drafting - computed * known)
            self.behind.add(lag)
        # What copied tokens took is no cost of the steps.
        taken = drafting + timings.verify - self.slope * copied
        seconds = self.cycle.without_outlier(taken)
        # The first one after ordinary steps takes longer: the drafter catches up on what it has not
        # seen, and its weights have left the processor's caches.
        if self._drafted or is_first:
            self._add_step(timings)
            self.cycle.add(seconds)
        self.add_verify(len(timings.steps) + copied + 1, timings.verify)
        self.tokens.add(tokens)
        self._add_draft(seconds)
        # The first one of a size also prepares the next ones, which may take a multiple of it.
        if self.ordinary.value and not is_first:
            self.budget.add_drafts(tokens - seconds / self.ordinary.value)

    def _add_step(self, timings: Timings) -> None:
        """Add what one more draft step usually takes."""
        # The first step may have caught up on what the drafter had not seen, and single ones may
        # have waited for other work.
        first, *more = timings.steps
        if timings.step is not None:
            self.step.add(timings.step)
        elif more or not self.step.weight:
            self.step.add(statistics.median(more or [first]))
        else:
            self.step.add(min(first, self.step.value))
