"""Drafting token by token, for as long as a rule says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from fastvlm.decoding.batch import Batch
from fastvlm.drafting.draft_length import DraftLength, Progress, Timings

Guess = Callable[[list[int], int], Tensor]
"""From each row's last token and the number of drafted ones: logits, (batch, draft vocabulary)."""
Choose = Callable[[Tensor], tuple[list[int], list[float]]]
"""From logits: each row's token and the drafter's probability of it."""


class TokenByToken:
    """Drafts as long as a rule says, and tells the rule what came of it and what it took.

    Args:
        length: The rule.
        clock: Seconds, from any point on.
    """

    def __init__(self, length: DraftLength, clock: Callable[[], float]) -> None:
        self.length, self.clock = length, clock
        self.progress: Progress | None = None
        self.times: list[float] = []

    def draft(
        self, batch: Batch, limits: Sequence[int], behind: int, guess: Guess, choose: Choose
    ) -> list[list[int]]:
        """Return each row's draft.

        Args:
            batch: The rows.
            limits: The most tokens of each row's draft.
            behind: Positions before the last committed token that the drafter has not seen yet.
            guess: The drafter.
            choose: How a token is chosen.
        """
        rows = range(len(batch.last))
        tokens: list[list[int]] = [[] for _ in rows]
        progress = self.progress = Progress(
            open=[a and limit > 0 for a, limit in zip(batch.active, limits, strict=True)],
            confidences=[[] for _ in rows],
            remaining=[limit + 1 for limit in limits],
            replied=[batch.replied(row) for row in rows],
            behind=behind,
        )
        self.times = [self.clock()]
        last = batch.last
        while any(going := self.length.goes_on(progress)):
            last, confidences = choose(guess(last, progress.steps))
            for row in rows:
                if going[row]:
                    tokens[row].append(last[row])
                    progress.confidences[row].append(confidences[row])
                    progress.open[row] = (
                        last[row] not in batch.end_tokens and len(tokens[row]) < limits[row]
                    )
            self.times.append(self.clock())
        return tokens

    def commit(self, accepted: Sequence[int]) -> None:
        """Tell the rule how many tokens each row accepted; the verify has just ended."""
        if self.progress is not None:
            times = self.times
            steps = [end - begin for begin, end in pairwise(times)]
            timings = Timings(steps, self.clock() - times[-1])
            self.length.learn(self.progress, accepted, timings)
            self.progress = None
