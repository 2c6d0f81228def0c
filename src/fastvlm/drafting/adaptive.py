"""Drafts that go on while another token raises the expected tokens per second."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from fastvlm.drafting.costs import CycleCosts
from fastvlm.drafting.draft_length import Progress, Timings, check_maximum

CONFIDENCE_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
"""Between the bins of confidence."""
COUNT_DECAY = 0.98
"""A bin remembers about its last fifty tokens."""
PRIOR_WEIGHT = 3.0
NEXT_ACCEPTANCE_PRIOR = 0.85
"""Acceptance of the token after an accepted one, until it is measured."""
THROUGHPUT_DECAY = 0.9
"""The rate of drafting is that of about the last ten cycles: of one reply, more or less."""
INITIAL_BUDGET_STEPS = 6.0
"""Ordinary steps that drafting may lose at first, to show what it brings."""
MAX_BUDGET_STEPS = 32.0
"""The most of what drafting has saved, in ordinary steps, that it may lose again,"""
MAX_DEBT_STEPS = 4.0
"""and the most that it may owe."""
PROBE_TIME_SHARE = 0.01
"""What ordinary steps add to the budget of a draft that loses: the share of time it may cost."""
PROMISING_TIME_SHARE = 0.1
"""What they add if the estimates say that drafting pays: a good draft that lost its budget to a
load that came and went is soon tried again."""
MEASURE_ORDINARY_EVERY = 64
"""Cycles with a draft after which an ordinary step is measured again."""
CLOSE_CALL_RATIO = 1.3
"""Drafting that is not this much faster may be slower by now, on a machine with other work,"""
CLOSE_CALL_EVERY = 12
"""and then an ordinary step is measured more often."""
REPLY_WINDOW = 32
"""Replies whose lengths are remembered."""
UNKNOWN_ODDS = 0.5
"""While it is unknown what a draft brings: the share of replies that may end with the next token,
and the acceptance below which a token is not drafted."""


class Rates:
    """Decayed counts of accepted tokens, in bins, each with a prior."""

    def __init__(self, priors: Sequence[float]) -> None:
        self.seen = [PRIOR_WEIGHT] * len(priors)
        self.accepted = [PRIOR_WEIGHT * prior for prior in priors]

    def add(self, index: int, accepted: bool) -> None:
        """Count a token that was compared with the target's."""
        self.seen[index] = COUNT_DECAY * self.seen[index] + 1
        self.accepted[index] = COUNT_DECAY * self.accepted[index] + accepted

    def __getitem__(self, index: int) -> float:
        """The estimated acceptance of a bin."""
        return self.accepted[index] / self.seen[index]


class Throughput:
    """How drafting does against ordinary decoding, for batches of one size: tokens of a row."""

    def __init__(self) -> None:
        self.costs = CycleCosts()
        self.budget_steps = INITIAL_BUDGET_STEPS
        """Ordinary steps that drafting may still lose."""
        self.since_ordinary = 0
        self.tokens = self.cycles = self.steps = 0.0
        self.drafting = 0.0
        """Tokens per second of cycles with a draft, at what their parts usually take; 0 before the
        first."""

    def add(self, tokens: float, steps: int) -> None:
        """Count a cycle with a draft: tokens that a row gained on average, and draft steps."""
        self.tokens = THROUGHPUT_DECAY * self.tokens + tokens
        self.steps = THROUGHPUT_DECAY * self.steps + steps
        self.cycles = THROUGHPUT_DECAY * self.cycles + 1
        usual = self.steps / self.cycles
        seconds = self.costs.step.of_all(usual) + self.costs.verify.of(usual + 1)
        self.drafting = self.tokens / self.cycles / seconds

    def add_budget(self, steps: float) -> None:
        """Add to drafting's budget, which neither grows nor falls without end."""
        self.budget_steps = max(-MAX_DEBT_STEPS, min(self.budget_steps + steps, MAX_BUDGET_STEPS))

    @property
    def ordinary(self) -> float:
        """Tokens per second of ordinary steps; 0 before the first."""
        seconds = self.costs.verify.ordinary.median
        return 1 / seconds if seconds else 0.0


class AdaptiveLength:
    """Drafts that end when one more token no longer raises the expected tokens per second.

    With estimates p_i of the acceptance of each drafted token by the drafter's confidence in it, q
    of the next one's, and r the tokens per second reached so far, a draft goes on while

        p_1 ... p_n q > r (d + v)

    for a draft step of d seconds and v that a token adds to the verify; of a batch, both sides are
    a row's on average. (The marginal value theorem: what brings less than the average rate is not
    worth its time.) Whether there is a draft at all is a matter of a budget: what drafting saves,
    it may lose again later, and where it saves nothing it loses `PROBE_TIME_SHARE` of the time and
    the budget it starts with. While the estimates say that it pays, it is tried again sooner, at
    `PROMISING_TIME_SHARE`; each try mends estimates that are wrong.

    The estimates belong to one drafter and one target, and serve all their requests, so they are
    kept from one to the next. Rejected or accepted, no token depends on them.

    Args:
        maximum: The most tokens in a draft.
    """

    reads_confidence = True

    def __init__(self, maximum: int = 24) -> None:
        check_maximum(maximum)
        self.maximum = maximum
        bounds = (0.0, *CONFIDENCE_EDGES, 1.0)
        # A drafter that gives a token half of its probability has the same favourite as the target
        # more often than half of the time.
        self.by_confidence = Rates([1 - (1 - (a + b) / 2) ** 2 for a, b in pairwise(bounds)])
        """Acceptance of a token by the drafter's confidence in it."""
        self.after_confidence = Rates([NEXT_ACCEPTANCE_PRIOR] * (len(CONFIDENCE_EDGES) + 1))
        """Acceptance of the token after an accepted one, by the confidence in that one."""
        self.throughputs: dict[int, Throughput] = {}
        self.lengths: deque[int] = deque(maxlen=REPLY_WINDOW)

    def throughput(self, rows: int) -> Throughput:
        """Return what is known of batches of a size."""
        if rows not in self.throughputs:
            self.throughputs[rows] = Throughput()
        return self.throughputs[rows]

    def should_continue(self, progress: Progress) -> list[bool]:
        """Return whether each row drafts another token: all that can, or none.

        A step takes as long for one row as for all, so a row never stops alone.
        """
        steps = progress.steps
        goes = (
            steps < self.maximum
            and any(progress.active)
            and (self.should_extend(progress) if steps else self.should_draft(progress))
        )
        return [goes and is_active for is_active in progress.active]

    def should_draft(self, progress: Progress) -> bool:
        """Return whether to draft at all in this cycle."""
        throughput = self.throughput(len(progress.active))
        if not self.is_worth_it(progress, throughput):
            return False
        if not throughput.cycles:
            return True
        # An ordinary step is measured early, and then now and then.
        measured = len(throughput.costs.verify.ordinary.values)
        close_call = throughput.drafting < CLOSE_CALL_RATIO * throughput.ordinary
        every = CLOSE_CALL_EVERY if close_call else MEASURE_ORDINARY_EVERY
        if throughput.since_ordinary >= min(2 ** (measured + 1), every):
            return False
        return throughput.budget_steps * throughput.costs.verify.ordinary.median >= self.probe(
            progress, throughput
        )

    def is_worth_it(self, progress: Progress, throughput: Throughput) -> bool:
        """Return whether what is expected of the replies is worth a draft."""
        rows = [row for row, is_active in enumerate(progress.active) if is_active]
        left = max(
            self.expected_remaining(progress.generated[row], progress.remaining[row])
            for row in rows
        )
        if left <= 1:
            # The next token is the last, and an ordinary step gives it.
            return False
        ending = min(self.p_end_next(progress.generated[row]) for row in rows)
        ordinary = throughput.costs.verify.ordinary.median
        if not ordinary or throughput.drafting <= throughput.ordinary:
            return ending <= UNKNOWN_ODDS
        # Waiting a step shows whether the reply goes on: the draft is too late, or was for nothing.
        saved = ordinary - 1 / throughput.drafting
        if ending * self.probe(progress, throughput) > (1 - ending) * saved:
            return False
        return throughput.costs.catch_up(progress.lag) < left * saved

    def longer_replies(self, replied: int) -> list[int]:
        """Return the lengths of the last replies that were longer than so many tokens."""
        return [length for length in self.lengths if length > replied]

    def expected_remaining(self, replied: int, remaining: int) -> float:
        """Return how many more tokens a reply is expected to have, after so many."""
        longer = self.longer_replies(replied)
        return min(sum(longer) / len(longer) - replied, remaining) if longer else remaining

    def p_end_next(self, replied: int) -> float:
        """Return the share of replies of so many tokens that the next one ended."""
        longer = self.longer_replies(replied)
        return longer.count(replied + 1) / len(longer) if longer else 0.0

    def probe(self, progress: Progress, throughput: Throughput) -> float:
        """Return the seconds that a draft of one token loses if it is rejected."""
        costs = throughput.costs
        return (
            costs.catch_up(progress.lag)
            + costs.step.of(0)
            + costs.verify.of(2)
            - costs.verify.of(1)
        )

    def should_extend(self, progress: Progress) -> bool:
        """Return whether one more token raises the expected tokens per second."""
        throughput = self.throughput(len(progress.active))
        gain, drafting = 0.0, 0
        for is_active, confidences in zip(progress.active, progress.confidences, strict=True):
            drafting += bool(confidences)
            if is_active and confidences:
                bins = [bisect_right(CONFIDENCE_EDGES, confidence) for confidence in confidences]
                gain += (
                    math.prod(self.by_confidence[index] for index in bins)
                    * self.after_confidence[bins[-1]]
                )
        gain /= drafting
        if not throughput.cycles:
            # Nothing is known of costs yet.
            return gain > UNKNOWN_ODDS
        rate = max(throughput.drafting, throughput.ordinary)
        return gain > rate * (
            throughput.costs.step.of(progress.steps) + throughput.costs.verify.slope
        )

    def update(self, progress: Progress, accepted: Sequence[int], timings: Timings) -> None:
        """Learn from a cycle: what was accepted, and what it took."""
        throughput = self.throughput(len(progress.active))
        steps = progress.steps
        throughput.costs.add(timings.steps, progress.lag, steps + 1, timings.verify)
        ordinary = throughput.costs.verify.of(1)
        if not steps:
            throughput.since_ordinary = 0
            throughput.add_budget(
                PROMISING_TIME_SHARE
                if throughput.drafting > throughput.ordinary
                else PROBE_TIME_SHARE
            )
            return
        tokens = rows = 0
        for confidences, count in zip(progress.confidences, accepted, strict=True):
            if not confidences:
                continue
            rows += 1
            tokens += count + 1
            for place, confidence in enumerate(confidences[: count + 1]):
                index = bisect_right(CONFIDENCE_EDGES, confidence)
                self.by_confidence.add(index, place < count)
                if place:
                    before = bisect_right(CONFIDENCE_EDGES, confidences[place - 1])
                    self.after_confidence.add(before, place < count)
        throughput.add(tokens / rows, steps)
        throughput.since_ordinary += 1
        taken = sum(timings.steps) + timings.verify
        if ordinary:
            throughput.add_budget(tokens / rows - taken / ordinary)

    def on_finish(self, tokens: int) -> None:
        """Learn a reply's length."""
        self.lengths.append(tokens)
