"""Drafts that go on while another token raises the expected tokens per second."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from fastvlm.drafting.costs import CycleCosts
from fastvlm.drafting.draft_length import Progress, Timings, check_maximum

EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
"""Between the bins of confidence."""
FORGET = 0.98
"""A bin remembers about its last fifty tokens."""
PRIOR_WEIGHT = 3.0
FOLLOWING = 0.85
"""Acceptance of the token after an accepted one, until it is measured."""
PACE_DECAY = 0.9
"""The rate of drafting is that of about the last ten cycles: of one reply, more or less."""
GRANT = 6.0
"""Ordinary steps that drafting may lose at first, to show what it brings."""
MOST_CREDIT = 32.0
"""The most of what drafting has saved, in ordinary steps, that it may lose again,"""
MOST_DEBT = 4.0
"""and the most that it may owe."""
PROBE_SHARE = 0.01
"""What ordinary steps add to the credit of a draft that loses: the share of time it may cost."""
BELIEVED_SHARE = 0.1
"""What they add if the estimates say that drafting pays: a good draft that lost its credit to a
load that came and went is soon tried again."""
ORDINARY_EVERY = 64
"""Cycles with a draft after which an ordinary step is measured again."""
CLOSE = 1.3
"""Drafting that is not this much faster may be slower by now, on a machine with other work,"""
CLOSE_EVERY = 12
"""and then an ordinary step is measured more often."""
REPLIES = 32
"""Replies whose lengths are remembered."""
EVEN = 0.5
"""While it is unknown what a draft brings: the share of replies that may end with the next token,
and the acceptance below which a token is not drafted."""


class Rates:
    """Decayed counts of accepted tokens, in bins, each with a prior."""

    def __init__(self, priors: Sequence[float]) -> None:
        self.seen = [PRIOR_WEIGHT] * len(priors)
        self.accepted = [PRIOR_WEIGHT * prior for prior in priors]

    def add(self, index: int, accepted: bool) -> None:
        """Count a token that was compared with the target's."""
        self.seen[index] = FORGET * self.seen[index] + 1
        self.accepted[index] = FORGET * self.accepted[index] + accepted

    def __getitem__(self, index: int) -> float:
        """The estimated acceptance of a bin."""
        return self.accepted[index] / self.seen[index]


class Pace:
    """How drafting does against ordinary decoding, for batches of one size: tokens of a row."""

    def __init__(self) -> None:
        self.costs = CycleCosts()
        self.credit = GRANT
        """Ordinary steps that drafting may still lose."""
        self.since_ordinary = 0
        self.tokens = self.cycles = self.steps = 0.0
        self.drafting = 0.0
        """Tokens per second of cycles with a draft, at what their parts usually take; 0 before the
        first."""

    def add(self, tokens: float, steps: int) -> None:
        """Count a cycle with a draft: tokens that a row gained on average, and draft steps."""
        self.tokens = PACE_DECAY * self.tokens + tokens
        self.steps = PACE_DECAY * self.steps + steps
        self.cycles = PACE_DECAY * self.cycles + 1
        usual = self.steps / self.cycles
        seconds = self.costs.step.of_all(usual) + self.costs.verify.of(usual + 1)
        self.drafting = self.tokens / self.cycles / seconds

    def earn(self, steps: float) -> None:
        """Add to drafting's credit, which neither grows nor falls without end."""
        self.credit = max(-MOST_DEBT, min(self.credit + steps, MOST_CREDIT))

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
    worth its time.) Whether there is a draft at all is a matter of credit: what drafting saves, it
    may lose again later, and where it saves nothing it loses `PROBE_SHARE` of the time and the
    grant it starts with. While the estimates say that it pays, it is tried again sooner, at
    `BELIEVED_SHARE`; each try mends estimates that are wrong.

    The estimates belong to one drafter and one target, and serve all their requests, so they are
    kept from one to the next. Rejected or accepted, no token depends on them.

    Args:
        maximum: The most tokens in a draft.
    """

    reads_confidence = True

    def __init__(self, maximum: int = 24) -> None:
        check_maximum(maximum)
        self.maximum = maximum
        bounds = (0.0, *EDGES, 1.0)
        # A drafter that gives a token half of its probability has the same favourite as the target
        # more often than half of the time.
        self.sure = Rates([1 - (1 - (a + b) / 2) ** 2 for a, b in pairwise(bounds)])
        """Acceptance of a token by the drafter's confidence in it."""
        self.following = Rates([FOLLOWING] * (len(EDGES) + 1))
        """Acceptance of the token after an accepted one, by the confidence in that one."""
        self.paces: dict[int, Pace] = {}
        self.lengths: deque[int] = deque(maxlen=REPLIES)

    def pace(self, rows: int) -> Pace:
        """Return what is known of batches of a size."""
        return self.paces.setdefault(rows, Pace())

    def goes_on(self, progress: Progress) -> list[bool]:
        """Return whether each row drafts another token: all that can, or none.

        A step takes as long for one row as for all, so a row never stops alone.
        """
        steps = progress.steps
        goes = (
            steps < self.maximum
            and any(progress.open)
            and (self.another(progress) if steps else self.begins(progress))
        )
        return [goes and is_open for is_open in progress.open]

    def begins(self, progress: Progress) -> bool:
        """Return whether to draft at all in this cycle."""
        pace = self.pace(len(progress.open))
        if not self.pays(progress, pace):
            return False
        if not pace.cycles:
            return True
        # An ordinary step is measured early, and then now and then.
        measured = len(pace.costs.verify.ordinary.values)
        close_call = pace.drafting < CLOSE * pace.ordinary
        every = CLOSE_EVERY if close_call else ORDINARY_EVERY
        if pace.since_ordinary >= min(2 ** (measured + 1), every):
            return False
        return pace.credit * pace.costs.verify.ordinary.median >= self.probe(progress, pace)

    def pays(self, progress: Progress, pace: Pace) -> bool:
        """Return whether what is expected of the replies is worth a draft."""
        rows = [row for row, is_open in enumerate(progress.open) if is_open]
        left = max(self.left(progress.replied[row], progress.remaining[row]) for row in rows)
        if left <= 1:
            # The next token is the last, and an ordinary step gives it.
            return False
        ending = min(self.ending(progress.replied[row]) for row in rows)
        ordinary = pace.costs.verify.ordinary.median
        if not ordinary or pace.drafting <= pace.ordinary:
            return ending <= EVEN
        # Waiting a step shows whether the reply goes on: the draft is too late, or was for nothing.
        saved = ordinary - 1 / pace.drafting
        if ending * self.probe(progress, pace) > (1 - ending) * saved:
            return False
        return pace.costs.catch_up(progress.behind) < left * saved

    def replies_like(self, replied: int) -> list[int]:
        """Return the lengths of the last replies that were longer than so many tokens."""
        return [length for length in self.lengths if length > replied]

    def left(self, replied: int, remaining: int) -> float:
        """Return how many more tokens a reply is expected to have, after so many."""
        longer = self.replies_like(replied)
        return min(sum(longer) / len(longer) - replied, remaining) if longer else remaining

    def ending(self, replied: int) -> float:
        """Return the share of replies of so many tokens that the next one ended."""
        longer = self.replies_like(replied)
        return longer.count(replied + 1) / len(longer) if longer else 0.0

    def probe(self, progress: Progress, pace: Pace) -> float:
        """Return the seconds that a draft of one token loses if it is rejected."""
        costs = pace.costs
        return (
            costs.catch_up(progress.behind)
            + costs.step.of(0)
            + costs.verify.of(2)
            - costs.verify.of(1)
        )

    def another(self, progress: Progress) -> bool:
        """Return whether one more token raises the expected tokens per second."""
        pace = self.pace(len(progress.open))
        gain, drafting = 0.0, 0
        for is_open, confidences in zip(progress.open, progress.confidences, strict=True):
            drafting += bool(confidences)
            if is_open and confidences:
                bins = [bisect_right(EDGES, confidence) for confidence in confidences]
                gain += math.prod(self.sure[index] for index in bins) * self.following[bins[-1]]
        gain /= drafting
        if not pace.cycles:
            # Nothing is known of costs yet.
            return gain > EVEN
        rate = max(pace.drafting, pace.ordinary)
        return gain > rate * (pace.costs.step.of(progress.steps) + pace.costs.verify.slope)

    def learn(self, progress: Progress, accepted: Sequence[int], timings: Timings) -> None:
        """Learn from a cycle: what was accepted, and what it took."""
        pace = self.pace(len(progress.open))
        steps = progress.steps
        pace.costs.add(timings.steps, progress.behind, steps + 1, timings.verify)
        ordinary = pace.costs.verify.of(1)
        if not steps:
            pace.since_ordinary = 0
            pace.earn(BELIEVED_SHARE if pace.drafting > pace.ordinary else PROBE_SHARE)
            return
        tokens = rows = 0
        for confidences, count in zip(progress.confidences, accepted, strict=True):
            if not confidences:
                continue
            rows += 1
            tokens += count + 1
            for place, confidence in enumerate(confidences[: count + 1]):
                index = bisect_right(EDGES, confidence)
                self.sure.add(index, place < count)
                if place:
                    before = bisect_right(EDGES, confidences[place - 1])
                    self.following.add(before, place < count)
        pace.add(tokens / rows, steps)
        pace.since_ordinary += 1
        taken = sum(timings.steps) + timings.verify
        if ordinary:
            pace.earn(tokens / rows - taken / ordinary)

    def finish(self, tokens: int) -> None:
        """Learn a reply's length."""
        self.lengths.append(tokens)
