"""Drafts that go on while another token raises the expected tokens per second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

from fastvlm.drafting.draft_length import Offer, Progress, Timings, check_maximum
from fastvlm.drafting.estimates import Mean, VerifyCost
from fastvlm.drafting.throughput import Budget, Throughput

CONFIDENCE_BINS = 16
"""Bins of the drafter's confidence: every second one halves its distance to 1."""
PRIOR_TOKENS = 3
"""The weight of an initial acceptance estimate, in tokens."""
COPY_MATCHES = 16
"""Lengths of a match that are told apart, from one token."""
WRONG_AFTER_MATCH = 0.8
"""The share that each token of a match leaves of the assumed chance that a copy is wrong."""
COPY_MARGIN = 1.1
"""How many times its cost a copy has to promise: of a small model, passes of changing widths take
some of a gain away, and so does what a cycle with a copy does beside its pass."""
AVERAGED_TOKENS = 50
"""The number of tokens over which acceptance rates are averaged."""

ONE_WORD_TOKENS = 2
"""Tokens in a reply of one word: the word, and the end token."""
MAJORITY_SHARE = 0.5
"""The share of one-word replies above which most replies count as such."""


class AdaptiveLength:
    """Drafts that end when one more token no longer raises the expected tokens per second.

    With estimates p_i of the acceptance of each drafted token by the drafter's confidence in it, q
    of a token after an accepted one, and r the tokens per second reached so far, a draft goes on
    while

        p_1 ... p_n q > r (d + v)

    for a draft step of d seconds and v that a token adds to the verify; of a batch, both sides are
    a row's on average. (The marginal value theorem: what brings less than the average rate is not
    worth its time. A token that was drafted together with the one before has no d of its own.)
    There is a draft at all while drafts are faster than ordinary steps, or have a
    budget (`throughput.Budget`): they begin with one, may lose what they have saved, and ordinary
    steps add a share of their time.

    Copied tokens (prompt lookup) take no step, so their d is 0, and p is known by the length of the
    match. A copy ends a draft, or is all of it, where it raises the expected tokens of its time
    above what the average of other cycles gives, and above what further steps promise.

    The more rows a batch has, the more a verify's further tokens cost beside an ordinary step, so
    costs are those of the batch's size: with a full batch there may be no drafts at all. A size
    that is new takes over the estimates and the budget of the nearest one that is known, as a load
    that comes and goes would otherwise pay for each size anew.

    The estimates belong to one drafter and one target, and serve all their requests, so they are
    kept from one to the next. Rejected or accepted, no token depends on them.

    Args:
        maximum: The most tokens in a draft.

    Raises:
        InputError: The maximum is below 1.
    """

    reads_confidence = True

    def __init__(self, maximum: int = 24) -> None:
        check_maximum(maximum)
        self.maximum = maximum
        # A drafter that gives a token half of its probability has the same favourite as the target
        # more often than half of the time: assumed is 1 - (1 - confidence)^2.
        assumed = [1 - 2 ** -(place + 0.5) for place in range(CONFIDENCE_BINS)]
        self.by_confidence = [Mean(AVERAGED_TOKENS, value, PRIOR_TOKENS) for value in assumed]
        self.after_accepted = Mean(AVERAGED_TOKENS, 1.0, PRIOR_TOKENS)
        """Acceptance of a token after an accepted one."""
        self.by_match = [
            Mean(AVERAGED_TOKENS, 1 - WRONG_AFTER_MATCH**match, PRIOR_TOKENS)
            for match in range(1, COPY_MATCHES + 1)
        ]
        """Acceptance of a copied token, by the length of the match before it."""
        self.throughputs: dict[int, Throughput] = {}
        """By the rows of a batch."""
        self.budgets: dict[int, Budget] = {}
        """By the number of bits of these: were there one for each size, a batch whose rows end one
        after another would lose as much at each."""
        self.verifies = VerifyCost()
        self.one_word = Mean()
        """The share of replies that an ordinary step after the prefill ends."""

    def throughput(self, rows: int) -> Throughput:
        """Return what is measured of batches of a size."""
        if rows not in self.throughputs:
            nearest, sort = self._nearest(rows), rows.bit_length()
            if sort not in self.budgets:
                self.budgets[sort] = Budget() if nearest is None else copy(nearest.budget)
            self.throughputs[rows] = Throughput(self.budgets[sort], self.verifies, rows)
        return self.throughputs[rows]

    def estimate(self, rows: int) -> Throughput:
        """Return what is known of batches of a size; of the nearest one, until it is measured."""
        return self._nearest(rows) or self.throughput(rows)

    def _nearest(self, rows: int) -> Throughput | None:
        own = self.throughputs.get(rows)
        if own is not None and own.is_measured:
            return own
        measured = [size for size, known in self.throughputs.items() if known.is_measured]
        if not measured:
            return None
        return self.throughputs[min(measured, key=lambda size: (abs(size - rows), size))]

    def acceptance(self, confidence: float) -> Mean:
        """Return the mean acceptance of tokens of about this confidence."""
        halvings = -math.log2(max(1 - confidence, 2.0**-CONFIDENCE_BINS))
        return self.by_confidence[min(int(2 * halvings), CONFIDENCE_BINS - 1)]

    def rests(self, rows: int, *, lag: int | None) -> bool:
        """Return whether drafts don't pay and have no budget. See `DraftLength.rests`."""
        throughput = self.throughput(rows)
        if lag is not None and throughput.should_draft(pays=self.estimate(rows).pays, lag=lag):
            return False
        return throughput.rests()

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
        if self.one_word.value > MAJORITY_SHARE and max(progress.generated) <= 1:
            # An ordinary step ends most replies here, and shows which of them go on.
            return False
        rows = len(progress.active)
        pays = self.estimate(rows).pays
        return self.throughput(rows).should_draft(pays=pays, lag=progress.lag)

    def should_extend(self, progress: Progress) -> bool:
        """Return whether one more token raises the expected tokens per second."""
        reached = self._reached(progress)
        accepted = sum(
            x for x, is_active in zip(reached, progress.active, strict=True) if is_active
        )
        throughput = self.estimate(len(progress.active))
        # Before anything is measured, a token is drafted if it is more likely right than wrong.
        step = 0.0 if progress.ahead else throughput.step.value
        needed = throughput.best * (step + throughput.slope) or 0.5
        return accepted * self.after_accepted.value > needed * sum(map(bool, progress.confidences))

    def _reached(self, progress: Progress) -> list[float]:
        """Return the chance that all that a row's drafter has proposed so far is accepted."""
        for row, confidences in enumerate(progress.confidences):
            known, chance = progress.chances[row]
            if known < len(confidences):
                for confidence in confidences[known:]:
                    chance *= self.acceptance(confidence).value
                progress.chances[row] = len(confidences), chance
        return [chance for _, chance in progress.chances]

    def copy_acceptance(self, match: int) -> Mean:
        """Return the mean acceptance of a copied token after a match of so many tokens."""
        return self.by_match[min(match, COPY_MATCHES) - 1]

    def should_copy(self, progress: Progress, offers: Sequence[Offer]) -> list[int]:
        """Return how many of the offered tokens to copy. See `DraftLength.should_copy`."""
        rows, left = len(progress.active), self.maximum - progress.steps
        if not progress.steps and self.throughput(rows).wants_ordinary:
            return [0] * rows
        throughput = self.estimate(rows)
        reached = self._reached(progress)
        most = min(left, max((offer.tokens for offer in offers), default=0))
        rate = throughput.best
        # Before anything is measured, a token is copied if it is more likely right than wrong.
        needed = rate * throughput.slope if rate else 0.5
        chances, count, gained = list(reached), 0, 0.0
        while count < most:
            gain = 0.0
            for row, offer in enumerate(offers):
                if count < offer.tokens:
                    chances[row] *= self.copy_acceptance(offer.match + count).value
                    gain += chances[row] / rows
            if gain <= needed:
                break
            count, gained = count + 1, gained + gain
        if progress.steps:
            pays = gained - needed * count > self._further_gain(progress, reached)
        else:
            pays = not rate or 1 + gained > COPY_MARGIN * rate * throughput.verify_of(1 + count)
        if not (count and pays):
            # One token shows whether copies have come to pay.
            tries = not progress.steps and rate and throughput.budget.copies > 0
            count = 1 if tries and most else 0
        return [min(offer.tokens, count) for offer in offers]

    def _further_gain(self, progress: Progress, reached: Sequence[float]) -> float:
        """Return what further draft steps promise, in tokens of a row beyond their time."""
        if not any(self.should_continue(progress)):
            return 0.0
        throughput = self.estimate(len(progress.active))
        needed = throughput.best * (throughput.step.value + throughput.slope) or 0.5
        chance, gain = sum(reached) / len(reached), 0.0
        for _ in range(self.maximum - progress.steps):
            chance *= self.after_accepted.value
            if chance <= needed:
                break
            gain += chance - needed
        return gain

    def update(self, progress: Progress, accepted: Sequence[int], timings: Timings) -> None:
        """Update the estimates after a cycle. See `DraftLength.update`."""
        throughput = self.throughput(len(progress.active))
        if not progress.tokens:
            throughput.add_ordinary(timings.verify)
            return
        own = [min(n, len(c)) for n, c in zip(accepted, progress.confidences, strict=True)]
        for copied, confidences, count in zip(
            progress.copied, progress.confidences, accepted, strict=True
        ):
            # Where one of the drafter's own was wrong, no copied token was compared.
            right = count - len(confidences)
            for place, match in enumerate(copied[: max(right + 1, 0)]):
                self.copy_acceptance(match).add(place < right)
        copies = progress.tokens - progress.steps
        if not progress.steps:
            tokens = 1 + sum(accepted) / len(progress.active)
            throughput.add_copy(tokens, copies, timings.verify)
            return
        drafted = [pair for pair in zip(progress.confidences, own, strict=True) if pair[0]]
        for confidences, count in drafted:
            # Those after the first wrong one were not compared with the target's.
            for place, confidence in enumerate(confidences[: count + 1]):
                self.acceptance(confidence).add(place < count)
                if place:
                    self.after_accepted.add(place < count)
        # A row without a draft gains a token, too.
        tokens = 1 + sum(count for _, count in drafted) / len(progress.active)
        throughput.add_draft(tokens, timings, copies, progress.lag)

    def on_finish(self, tokens: int) -> None:
        """Update the share of one-word replies after a reply of so many tokens."""
        self.one_word.add(tokens <= ONE_WORD_TOKENS)
