"""Drafting token by token, for as long as a rule says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.selection import Drawn
from fastvlm.drafting.draft_length import DraftLength, Progress, Timings

Guess = Callable[[list[int], int], Tensor]
"""From each row's last token and the number of drafted ones: logits, (batch, draft vocabulary)."""


class TokenByToken:
    """Drafts as long as a rule says, and tells the rule what came of it and what it took.

    Args:
        length: The rule.
        clock: Seconds, from any point on.
        vocabulary: The tokens that can be drafted, (draft vocabulary,); None for all.
    """

    def __init__(
        self, length: DraftLength, clock: Callable[[], float], vocabulary: Tensor | None = None
    ) -> None:
        self.length, self.clock, self.vocabulary = length, clock, vocabulary
        self.progress: Progress | None = None
        self.times: list[float] = []

    def draft(
        self, batch: Batch, limits: Sequence[int], behind: int, guess: Guess
    ) -> list[list[Drawn]]:
        """Return each row's draft.

        Args:
            batch: The rows.
            limits: The most tokens of each row's draft.
            behind: Positions before the last committed token that the drafter has not seen yet.
            guess: The drafter.
        """
        rows = range(len(batch.last))
        drafts: list[list[Drawn]] = [[] for _ in rows]
        progress = self.progress = Progress(
            open=[limit > 0 for limit in limits],
            confidences=[[] for _ in rows],
            remaining=[limit + 1 for limit in limits],
            replied=[len(reply) for reply in batch.replies],
            behind=behind,
        )
        self.times = [self.clock()]
        last = batch.last
        while any(going := self.length.goes_on(progress)):
            logits = guess(last, progress.steps)
            found = (
                self.likeliest(logits) if batch.plain else self.drawn(logits, batch, drafts, going)
            )
            last = [drawn.token for drawn in found]
            for row in rows:
                if going[row]:
                    drafts[row].append(found[row])
                    progress.confidences[row].append(found[row].confidence)
                    progress.open[row] = (
                        last[row] not in batch.end_tokens and len(drafts[row]) < limits[row]
                    )
            self.times.append(self.clock())
        return drafts

    def likeliest(self, logits: Tensor) -> list[Drawn]:
        """Return each row's likeliest token.

        Args:
            logits: (batch, draft vocabulary).
        """
        if self.length.reads_confidence:
            top, best = logits.softmax(-1).max(-1)
            confidences = top.tolist()
        else:
            best = logits.argmax(-1)
            confidences = [1.0] * len(logits)
        tokens = best if self.vocabulary is None else self.vocabulary[best]
        return [
            Drawn(token, None, confidence)
            for token, confidence in zip(tokens.tolist(), confidences, strict=True)
        ]

    def drawn(
        self, logits: Tensor, batch: Batch, drafts: list[list[Drawn]], going: list[bool]
    ) -> list[Drawn]:
        """Return the next token of each row that goes on, as the row chooses it, and any of others.

        Args:
            logits: (batch, draft vocabulary).
            batch: The rows.
            drafts: What is drafted so far.
            going: Which rows go on.
        """
        if self.vocabulary is not None:
            whole = logits.new_full((len(logits), batch.vocabulary_size), -torch.inf)
            logits = whole.index_copy(1, self.vocabulary, logits)
        found = []
        for row, selection in enumerate(batch.selections):
            reply = [*batch.replies[row], *(drawn.token for drawn in drafts[row])]
            proposed = selection.propose(reply, logits[row]) if going[row] else None
            # Processors may forbid all that can be drafted; any token is a lossless guess.
            found.append(proposed or Drawn(batch.last[row], None, 0.0))
        return found

    def commit(self, accepted: Sequence[int]) -> None:
        """Tell the rule how many tokens each row accepted; the verify has just ended."""
        if self.progress is not None:
            times = self.times
            steps = [end - begin for begin, end in pairwise(times)]
            timings = Timings(steps, self.clock() - times[-1])
            self.length.learn(self.progress, accepted, timings)
            self.progress = None
