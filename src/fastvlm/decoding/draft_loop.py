"""Drafting token by token, for as long as a rule says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise

from torch import Tensor

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.history import Copy
from fastvlm.decoding.lookup import Lookup
from fastvlm.decoding.sampler import greedy_tokens, sampled_tokens
from fastvlm.drafting.draft_length import DraftLength, Offer, Progress, Timings

LOOKED_UP_EVERY = 4
"""While a draft goes on, tokens to copy are looked for at every so many of its steps."""

StepTokens = tuple[list[int], list[float]]
"""The tokens that a step drafts, and how likely each is: by rows."""
Ahead = Callable[[list[int], int, int], list[StepTokens] | None]
"""From each row's last token, the number of drafted ones and the most to draft now: what steps
draft; None where they are run one by one."""
DraftStep = Callable[[list[int], int], tuple[Tensor, Tensor | None]]
"""From each row's last token and the number of drafted ones: logits, (batch, draft vocabulary), and
the tokens of their columns, (draft vocabulary,); None for all tokens."""


@dataclass(slots=True)
class Draft:
    """What one cycle proposes.

    Args:
        rows: Each row's drafted tokens; rows may differ in number.
        hidden: The exit layer's hidden states of each row's last committed token and of all
            drafted ones but the last, (batch, g, d_model); None where no layer ran, or where a
            verify computes them anyway.
        progress: The state of the rule for the draft length; None where no rule decided.
        times: When each step began, and when the last one ended, in seconds.
        step: See `Timings.step`.
        computed: The positions whose layers drafting has run, of each row's last committed token
            and of drafted ones.
        forced: Whether rows end in tokens that no drafter has proposed, see `add_forced`.
    """

    rows: list[list[int]]
    hidden: Tensor | None = None
    progress: Progress | None = None
    times: list[float] = field(default_factory=list)
    step: float | None = None
    computed: int = 0
    forced: bool = False

    @property
    def width(self) -> int:
        """The number of tokens in the longest row."""
        return max(map(len, self.rows), default=0)

    def timings(self, verified: float) -> Timings:
        """Return the time of each part of the cycle, given when the verify ended."""
        steps = [end - begin for begin, end in pairwise(self.times)]
        return Timings(steps, verified - self.times[-1], self.step)


def draft_loop(
    batch: Batch,
    length: DraftLength,
    limits: Sequence[int],
    step: DraftStep | None,
    lookup: Lookup | None = None,
    ahead: Ahead | None = None,
) -> Draft:
    """Draft token by token, until a rule ends the draft, or a copy of earlier tokens does.

    What is drafted ahead of the rule is dropped where it ends the draft before.

    Args:
        batch: The rows.
        length: The rule.
        limits: The maximum number of tokens to draft for each row.
        step: The drafter; None for copies alone.
        lookup: What looks for tokens to copy; None for no copies.
        ahead: What drafts several tokens at once; None for nothing.
    """
    rows: list[list[int]] = [[] for _ in batch.slots]
    active = [limit > 0 for limit in limits]
    rooms = _rooms(limits, length, rows, active)
    found = lookup.copies(batch, rows, rooms) if lookup else []
    lag = max(slot.lag for slot in batch.slots)
    if not any(found) and length.rests(len(rows), lag=None if step is None else lag):
        # Of a small model, the rest of this would be a twentieth of an ordinary step.
        return Draft(rows)
    progress = Progress(
        active=active,
        confidences=[[] for _ in rows],
        remaining=[limit + 1 for limit in limits],
        generated=[len(reply) for reply in batch.replies],
        lag=lag,
    )
    times = [batch.clock()]
    last, ends = batch.last, [slot.request.end_token_ids for slot in batch.slots]
    drafted_ahead: list[StepTokens] | None = None
    together = 0
    while True:
        progress.ahead = bool(drafted_ahead)
        going = length.should_continue(progress) if step else []
        # Of a small model, a look-up before each step takes a tenth of it.
        if lookup and (not any(going) or progress.steps % LOOKED_UP_EVERY == 0):
            if progress.steps:
                found = lookup.copies(batch, rows, _rooms(limits, length, rows, progress.active))
            if any(found) and add_copies(length, rows, progress, found):
                break
        if step is None or not any(going):
            break
        if ahead is not None and not drafted_ahead:
            most = min(max(limits), length.maximum) - progress.steps
            drafted_ahead = ahead(last, progress.steps, most)
            together += len(drafted_ahead or ())
        if drafted_ahead:
            last, confidences = drafted_ahead.pop(0)
        else:
            logits, vocabulary = step(last, progress.steps)
            confident = length.reads_confidence
            last, confidences = _chosen(batch, rows, logits, vocabulary, confident=confident)
        for row in compress(range(len(rows)), going):
            rows[row].append(last[row])
            progress.confidences[row].append(confidences[row])
            more = len(rows[row]) < limits[row]
            progress.active[row] = more and last[row] not in ends[row]
        times.append(batch.clock())
    step_time = None
    if together:
        # What was drafted together, and what was dropped of it, took each token equally long.
        begun, taken = times[0], times[-1] - times[0]
        each = taken / progress.steps
        times = [begun + each * number for number in range(progress.steps + 1)]
        step_time = taken / max(together, progress.steps)
    return Draft(rows, progress=progress, times=times, step=step_time)


def _chosen(
    batch: Batch,
    rows: Sequence[list[int]],
    logits: Tensor,
    vocabulary: Tensor | None,
    *,
    confident: bool,
) -> StepTokens:
    """Return the tokens that a step drafts, by its logits.

    Args:
        batch: The rows.
        rows: Each row's drafted tokens.
        logits: Of each row, (batch, draft vocabulary).
        vocabulary: The tokens of the columns; None for all tokens.
        confident: Whether it matters how likely they are.
    """
    samplers = batch.samplers
    if all(sampler.is_greedy for sampler in samplers):
        return greedy_tokens(logits, vocabulary, confident=confident)
    known = [[*reply, *drafted] for reply, drafted in zip(batch.replies, rows, strict=True)]
    return sampled_tokens(samplers, known, logits, vocabulary, batch.decoder.vocabulary_size)


def _rooms(
    limits: Sequence[int],
    length: DraftLength,
    rows: Sequence[Sequence[int]],
    active: Sequence[bool],
) -> list[int]:
    """Return how many tokens each row could copy."""
    # Beside a longer row, the states behind a shorter one are those of other tokens.
    return [
        min(limit, length.maximum) - len(drafted) if is_active else 0
        for limit, drafted, is_active in zip(limits, rows, active, strict=True)
    ]


def add_copies(
    length: DraftLength,
    rows: list[list[int]],
    progress: Progress,
    found: Sequence[Copy | None],
) -> bool:
    """Add to each row the tokens that it copies, if a rule wants them; return whether it does.

    Args:
        length: The rule.
        rows: Each row's drafted tokens.
        progress: The state of the rule.
        found: What each row could copy.
    """
    offers = [Offer(len(copy.tokens), copy.match) if copy else Offer() for copy in found]
    counts = length.should_copy(progress, offers)
    for copy, count, drafted, copied in zip(found, counts, rows, progress.copied, strict=True):
        if copy and count:
            drafted.extend(copy.tokens[:count])
            copied.extend(range(copy.match, copy.match + count))
    return any(counts)


def add_forced(batch: Batch, draft: Draft, limits: Sequence[int]) -> None:
    """Add to each row the tokens that must follow, as its form allows no other there.

    No drafter runs for them, and none is rejected unless a token before it is.

    Args:
        batch: The rows.
        draft: What was drafted.
        limits: The maximum number of tokens in each row, with those that are drafted.
    """
    for row, (slot, limit) in enumerate(zip(batch.slots, limits, strict=True)):
        constraint, drafted = slot.request.sampler.constraint, draft.rows[row]
        if constraint is None or not draft.computed <= len(drafted) < limit:
            # Beside a longer row, the states behind a shorter one are those of other tokens.
            continue
        prefix = [*slot.request.output_token_ids, *drafted]
        more = constraint.forced(prefix, limit - len(drafted), batch.decoder.vocabulary_size)
        if more:
            draft.rows[row], draft.forced = [*drafted, *more], True
