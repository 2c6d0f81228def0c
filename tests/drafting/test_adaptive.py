"""Adaptive drafts, in worlds of known costs, against every fixed length and ordinary decoding."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from fastvlm.drafting import AdaptiveLength, ConfidenceLength, DraftLength, FixedLength
from fastvlm.drafting.adaptive import PRIOR_TOKENS
from fastvlm.drafting.draft_length import Offer, Progress, Timings
from fastvlm.drafting.estimates import OUTLIER_RATIO, Duration, Mean
from fastvlm.drafting.throughput import (
    BUDGET_STEPS,
    PROBE_STEPS,
    PROBE_TIME_SHARE,
    Throughput,
)
from fastvlm.functional.errors import InputError


@dataclass(frozen=True)
class World:
    """Costs in milliseconds, and how sure and how right a drafter is."""

    step: float
    verify: float
    slope: float
    confidences: tuple[float, ...]
    calibrated: bool = True
    ordinary: float = 28.0

    def reply(self, random_: random.Random, length: int) -> list[tuple[float, bool]]:
        """Return each position's confidence, and whether its draft is right."""
        sure = [random_.choice(self.confidences) for _ in range(length)]
        return [(c, random_.random() < (c if self.calibrated else 0.02)) for c in sure]

    def pass_of(self, width: int) -> float:
        """Return what a pass of the full model takes."""
        return self.ordinary if width == 1 else self.verify + self.slope * (width - 2)


SURE, UNSURE = (0.999, 0.999, 0.99, 0.97, 0.9, 0.6), (0.99, 0.95, 0.9, 0.7, 0.5, 0.3)
WORLDS = {
    # Measured on two cores: a pass of two tokens is a third dearer than one of one.
    "processor, sure": World(4.3, 36.0, 1.0, SURE),
    "processor, unsure": World(4.3, 36.0, 1.0, UNSURE),
    "accelerator, sure": World(3.0, 28.5, 0.05, SURE),
    "accelerator, unsure": World(3.0, 28.5, 0.05, UNSURE),
    "dear steps": World(12.0, 30.0, 1.0, SURE),
    "dear verifies": World(1.0, 36.0, 9.0, UNSURE),
}
UNTRAINED = {
    "unsure": World(4.3, 36.0, 1.0, (0.05, 0.1, 0.2, 0.3), calibrated=False),
    "sure all the same": World(4.3, 36.0, 1.0, (0.5, 0.7, 0.9, 0.99), calibrated=False),
}


def no_noise() -> float:
    return 1.0


def decoded(
    length: DraftLength,
    world: World,
    reply: Sequence[tuple[float, bool]],
    noise: Callable[[], float] = no_noise,
) -> float:
    """Decode a reply whose tokens are right or wrong as given; return what it took."""
    at, behind, total = 1, 40, 0.0
    while at < len(reply):
        if length.rests(1, lag=behind):
            total += world.pass_of(1) * noise()
            at, behind = at + 1, behind + 1
            continue
        progress = Progress([True], [[]], [10_000], [at], behind)
        steps = []
        while any(length.should_continue(progress)):
            place = at + progress.steps
            steps.append((world.step + 0.02 * (0 if steps else behind)) * noise())
            progress.confidences[0].append(reply[place][0] if place < len(reply) else 0.2)
            # The end token is seen when it is drafted.
            progress.active[0] = place < len(reply) - 1
        accepted = 0
        while accepted < progress.steps and at + accepted < len(reply) and reply[at + accepted][1]:
            accepted += 1
        verify = world.pass_of(progress.steps + 1) * noise()
        length.update(progress, [accepted], Timings(steps, verify))
        total += sum(steps) + verify
        at, behind = at + accepted + 1, 1 if steps else behind + 1
    length.on_finish(len(reply))
    return total


def replies(world: World, number: int, length: int = 100) -> list[list[tuple[float, bool]]]:
    chance = random.Random(1)
    return [world.reply(chance, length) for _ in range(number)]


@pytest.mark.parametrize("name", WORLDS)
def test_it_is_as_fast_as_the_best_fixed_length(name: str) -> None:
    world = WORLDS[name]
    asked = replies(world, 40)
    fixed = [sum(decoded(FixedLength(g), world, reply) for reply in asked) for g in range(1, 25)]
    length = AdaptiveLength(24)
    assert sum(decoded(length, world, reply) for reply in asked) < 1.005 * min(fixed)


@pytest.mark.parametrize("name", UNTRAINED)
@pytest.mark.parametrize("noisy", [False, True])
def test_an_untrained_draft_costs_next_to_nothing(name: str, noisy: bool) -> None:
    world = UNTRAINED[name]
    chance = random.Random(2)

    def noise() -> float:
        # Now and then something else has the processor.
        return (1 + 0.2 * chance.random()) * (3 if chance.random() < 0.03 else 1) if noisy else 1.0

    length = AdaptiveLength(24)
    taken = sum(decoded(length, world, reply, noise) for reply in replies(world, 30))
    # The noise's own mean: drawn once more, it would be off by half a percent.
    ordinary = world.ordinary * 30 * 99 * (1.1 * 1.06 if noisy else 1)
    assert taken < 1.03 * ordinary


def test_where_drafts_do_not_pay_the_rule_is_seldom_asked() -> None:
    world, asked = UNTRAINED["unsure"], []

    class Noted(AdaptiveLength):
        def update(self, *given: Any) -> None:
            asked.append(given)
            super().update(*given)

    length = Noted(24)
    for reply in replies(world, 20):
        decoded(length, world, reply)
    assert 20 < len(asked) < 20 * 100 / 4
    # Without copies, too, once their cost is known; and where there is nothing to draft with.
    rested = 0
    for place in range(160):
        if length.rests(1, lag=None):
            rested += 1
        else:
            length.update(Progress([True], [[]], [10_000], [place], 0), [0], Timings([], 28.0))
    assert 140 <= rested < 160
    assert FixedLength(4).rests(1, lag=None)
    assert not FixedLength(4).rests(1, lag=0)


def test_a_draft_that_becomes_good_is_noticed() -> None:
    bad, good = UNTRAINED["unsure"], WORLDS["processor, sure"]
    length = AdaptiveLength(24)
    for reply in replies(bad, 10):
        decoded(length, bad, reply)
    before = [decoded(length, good, reply) / 99 for reply in replies(good, 30)]
    known = AdaptiveLength(24)
    usual = [decoded(known, good, reply) / 99 for reply in replies(good, 30)]
    assert sum(before[10:]) < 1.03 * sum(usual[10:])


def test_nothing_is_drafted_where_replies_are_one_word() -> None:
    world = WORLDS["processor, sure"]
    length = AdaptiveLength(24)
    for reply in replies(world, 3):
        decoded(length, world, reply)
    taken = [decoded(length, world, reply) for reply in replies(world, 60, 2)]
    # At first the long replies before are believed.
    assert taken[10:] == [world.ordinary] * 50
    # And a long one, which is believed after a step, is still quick.
    [long] = replies(world, 1)
    assert decoded(length, world, long) / 99 < 0.5 * world.ordinary


def test_a_first_request_drafts_at_once() -> None:
    length = AdaptiveLength(24)
    assert length.should_continue(Progress([True], [[]], [100], [1], 40)) == [True]
    assert length.should_continue(Progress([False], [[]], [100], [1], 40)) == [False]


def taught(rows: int, step: float, slope: float, accepted: bool) -> AdaptiveLength:
    """Return drafts that have measured drafts of four tokens of confidence 0.85 and costs."""
    length = AdaptiveLength(24)
    for _ in range(200):
        progress = Progress([True] * rows, [[0.85] * 4] * rows, [100] * rows, [1] * rows, 1)
        count = [4 if accepted else 0] * rows
        length.update(progress, count, Timings([step] * 4, 1 + 4 * slope))
        ordinary = Progress([True] * rows, [[]] * rows, [100] * rows, [1] * rows, 1)
        length.update(ordinary, [0] * rows, Timings([], 1.0))
    return length


def test_rows_stop_together() -> None:
    length = taught(2, 0.1, 0.01, accepted=True)
    sure, unsure = [0.85], [0.05]
    assert length.should_continue(Progress([True, True], [sure, unsure], [9, 9], [1, 1])) == [
        True,
        True,
    ]
    assert length.should_continue(Progress([False, True], [sure, unsure], [9, 9], [1, 1])) == [
        False,
        False,
    ]
    assert length.should_continue(Progress([True, False], [sure, unsure], [9, 9], [1, 1])) == [
        True,
        False,
    ]


def test_batches_of_other_sizes_are_measured_for_themselves() -> None:
    length = taught(1, 0.1, 0.01, accepted=True)
    assert length.throughputs[1].step.value == pytest.approx(0.1)
    assert not length.throughput(4).step.weight


@dataclass(frozen=True)
class Machine:
    """Costs in milliseconds that grow with the rows of a batch, as those of a processor do."""

    fixed: float
    token: float
    draft: float = 0.2
    """A draft step's cost, as a share of an ordinary step's."""

    def verify(self, rows: int, width: int) -> float:
        return self.fixed + self.token * rows * width

    def step(self, rows: int) -> float:
        return self.draft * self.verify(rows, 1)


def per_token(
    machine: Machine, length: DraftLength | None, sizes: Sequence[int], cycles: int = 30
) -> float:
    """Return a token's cost where the load comes and goes; without drafts for no rule."""
    chance, total, tokens = random.Random(4), 0.0, 0
    for rows in sizes:
        for _ in range(cycles):
            progress = Progress([True] * rows, [[] for _ in range(rows)], [99] * rows, [9] * rows)
            steps = []
            while length is not None and any(length.should_continue(progress)):
                steps.append(machine.step(rows))
                for confidences in progress.confidences:
                    confidences.append(chance.choice((0.7, 0.9, 0.95)))
            accepted = [
                next((i for i, c in enumerate(row) if chance.random() > c), len(row))
                for row in progress.confidences
            ]
            verify = machine.verify(rows, len(steps) + 1)
            if length is not None:
                length.update(progress, accepted, Timings(steps, verify))
            total += sum(steps) + verify
            tokens += sum(accepted) + rows
    return total / tokens


def test_a_full_batch_is_not_slowed_down_and_a_single_row_is_faster() -> None:
    machine = Machine(fixed=40.0, token=10.0, draft=0.1)
    length = AdaptiveLength(24)
    # One client, and a load that no draft pays for, which comes and goes.
    for _ in range(3):
        assert per_token(machine, length, [1]) < 0.8 * per_token(machine, None, [1])
        busy = [*range(2, 17), *range(16, 1, -1)]
        assert per_token(machine, length, busy) < 1.03 * per_token(machine, None, busy)
        assert per_token(machine, length, [16], 300) < 1.03 * per_token(machine, None, [16])
    full = Progress([True] * 16, [[]] * 16, [99] * 16, [9] * 16)
    assert not any(length.should_continue(full))


def test_a_size_that_is_new_takes_over_what_is_known_of_the_nearest() -> None:
    for accepted in (True, False):
        length = taught(8, 0.1, 0.1, accepted=accepted)
        for rows in (7, 16):
            new = Progress([True] * rows, [[]] * rows, [100] * rows, [5] * rows, 1)
            assert any(length.should_continue(new)) == accepted
            assert length.estimate(rows) is length.throughputs[8]
    # Nothing of it is believed once the size itself is measured.
    length.throughput(16).add_draft(3.0, Timings([0.1], 1.0))
    assert length.estimate(16) is length.throughputs[8]
    length.throughput(16).add_ordinary(1.0)
    assert length.estimate(16) is length.throughputs[16]
    assert length.estimate(13) is length.throughputs[16]
    assert length.estimate(12) is length.throughputs[8]


def test_a_row_without_a_draft_counts() -> None:
    length = AdaptiveLength(24)
    progress = Progress([False, True], [[], [0.9, 0.9]], [1, 9], [5, 5])
    length.update(progress, [0, 2], Timings([0.1, 0.1], 1.0))
    assert length.throughputs[2].tokens.value == 2


def test_a_draft_has_at_most_its_maximum() -> None:
    length = AdaptiveLength(3)
    for drafted, goes in ((2, True), (3, False)):
        progress = Progress([True], [[1.0] * drafted], [100], [1])
        assert length.should_continue(progress) == [goes]
    with pytest.raises(InputError, match=r"at least one token; got .*0"):
        AdaptiveLength(0)


def test_probes_are_paid_from_what_ordinary_steps_take() -> None:
    length = taught(1, 10.0, 0.1, accepted=False)
    cycles, probes = 2000, 0
    for _ in range(cycles):
        progress = Progress([True], [[]], [100], [1], 1)
        if length.should_continue(progress) == [True]:
            probes += 1
            progress.confidences[0].append(0.85)
            length.update(progress, [0], Timings([1.0], 1.3))
        else:
            length.update(progress, [0], Timings([], 1.0))
    # A probe loses 1.3 steps.
    assert 0 < probes <= PROBE_TIME_SHARE * cycles / 1.3 + 2


def test_the_first_draft_after_ordinary_steps_tells_nothing_of_others() -> None:
    throughput, usual, first = Throughput(), Timings([0.2, 0.2], 1.2), Timings([0.8, 0.6], 1.6)
    throughput.add_ordinary(1.0)
    for _ in range(5):
        throughput.add_draft(1.8, usual)
    for _ in range(50):
        throughput.add_ordinary(1.0)
        throughput.add_draft(1.8, first)
        throughput.add_draft(1.8, usual)
    assert throughput.step.value == pytest.approx(0.2)
    assert throughput.cycle.value == pytest.approx(1.6)
    assert throughput.pays


def test_what_catching_up_takes_is_saved_before_drafts_begin_again() -> None:
    def rests_before_a_draft(lag: int) -> int:
        throughput = Throughput()
        for _ in range(3):
            throughput.add_ordinary(1.0)
            throughput.add_ordinary(1.0)
            # Catching up on 40 positions takes four steps.
            throughput.add_draft(1.0, Timings([4.2, 0.2], 1.2), lag=40)
            throughput.add_draft(1.0, Timings([0.2, 0.2], 1.2), lag=0)
        throughput.add_ordinary(1.0)
        throughput.budget.drafts = 0.0
        rests = 0
        while not throughput.should_draft(pays=False, lag=lag):
            throughput.add_ordinary(1.0)
            rests += 1
        return rests

    few, many, most = (rests_before_a_draft(lag) for lag in (0, 40, 4000))
    assert few == pytest.approx(PROBE_STEPS / PROBE_TIME_SHARE, abs=2)
    assert many == pytest.approx((PROBE_STEPS + 4) / PROBE_TIME_SHARE, rel=0.1)
    assert most == pytest.approx(BUDGET_STEPS / PROBE_TIME_SHARE, rel=0.1)


def test_the_same_measurements_give_the_same_drafts() -> None:
    world = WORLDS["processor, unsure"]
    one, other = AdaptiveLength(24), AdaptiveLength(24)
    asked = replies(world, 5)
    assert [decoded(one, world, r) for r in asked] == [decoded(other, world, r) for r in asked]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_draft_that_is_accepted_grows_and_one_that_is_not_shrinks(rows: int) -> None:
    def drafted(length: AdaptiveLength) -> int:
        progress = Progress([True] * rows, [[] for _ in range(rows)], [100] * rows, [5] * rows, 1)
        while any(length.should_continue(progress)):
            for confidences in progress.confidences:
                confidences.append(0.85)
        return progress.steps

    accepted, rejected = (taught(rows, 0.1, 0.01, accepted=accepted) for accepted in (True, False))
    # What is rejected from the first token on is not even tried now.
    assert drafted(accepted) == 24
    assert drafted(rejected) <= 1


def test_what_other_work_lengthened_counts_as_twice_the_mean() -> None:
    mean = Duration()
    assert mean.without_outlier(90.0) == 90.0
    mean.add(1.0)
    assert mean.without_outlier(90.0) == OUTLIER_RATIO
    assert mean.without_outlier(0.5) == 0.5
    mean.add(90.0)
    assert mean.value == (1 + OUTLIER_RATIO) / 2


def test_what_a_first_time_prepared_is_forgotten() -> None:
    mean = Duration()
    for taken in (90.0, 1.0, 1.5):
        mean.add(taken)
    assert mean.value == pytest.approx(1.25)


def test_a_first_draft_that_takes_long_does_not_end_drafting() -> None:
    world = WORLDS["processor, sure"]
    length, known = AdaptiveLength(24), AdaptiveLength(24)
    for rule, first in ((length, 50), (known, 1)):
        # Ordinary steps first, as where nothing could be drafted yet.
        for _ in range(3):
            rule.update(Progress([True], [[]], [99], [1]), [0], Timings([], world.ordinary))
        times = Timings([world.step * first], world.verify * first)
        rule.update(Progress([True], [[0.9]], [99], [5]), [1], times)
    asked = replies(world, 5)
    taken, usual = (sum(decoded(one, world, reply) for reply in asked) for one in (length, known))
    assert taken < 1.1 * usual


def test_batches_of_all_sizes_tell_what_a_token_adds() -> None:
    length = AdaptiveLength(24)
    for rows in (1, 8):
        length.throughput(rows).add_ordinary(3.0)
        # Of eight rows hardly more than first times, which prepared the next ones.
        for steps in (1, 7) * 6 if rows == 1 else (3, 3, 7):
            first = 90 if rows == 8 and not length.throughput(8).verify.weight else 0
            seconds = 3.0 + 0.1 * rows * steps + first
            length.throughput(rows).add_draft(2.0, Timings([0.5] * steps, seconds))
    assert length.throughput(1).slope == pytest.approx(0.1, rel=0.05)
    assert length.throughput(8).slope == pytest.approx(0.8, rel=0.3)


def test_a_mean_forgets() -> None:
    mean = Mean(window=4)
    for value in (1.0, 2.0, 3.0):
        mean.add(value)
    assert mean.value == pytest.approx(2.0)
    for _ in range(40):
        mean.add(7.0)
    assert mean.value == pytest.approx(7.0, rel=1e-3)


def test_what_a_token_adds_to_a_verify_is_measured() -> None:
    chance = random.Random(3)
    throughput = Throughput()
    assert throughput.slope == 0
    throughput.add_ordinary(28.0)
    for _ in range(200):
        steps = chance.choice((1, 4, 8, 11))
        # Two tokens are dearer than one by more than the next ones.
        throughput.add_draft(2.0, Timings([3.0] * steps, 34.0 + 1.5 * steps))
    assert throughput.slope == pytest.approx(1.5, rel=0.1)


def test_verifies_of_one_width_tell_by_what_they_take_beyond_an_ordinary_step() -> None:
    throughput = Throughput()
    throughput.add_ordinary(1.0)
    for _ in range(50):
        throughput.add_draft(2.0, Timings([0.1] * 4, 1.2))
    assert throughput.slope == pytest.approx(0.05)


def test_a_draft_that_was_short_for_long_knows_what_long_ones_cost() -> None:
    throughput = Throughput()
    throughput.add_ordinary(1.0)
    for steps in [*range(1, 16)] * 4 + [3] * 200:
        throughput.add_draft(2.0, Timings([0.1] * steps, 2.0 + 0.02 * steps))
    assert throughput.slope == pytest.approx(0.02, rel=0.3)


def test_the_first_verify_of_a_width_is_forgotten() -> None:
    throughput = Throughput()
    throughput.add_ordinary(1.0)
    for steps, seconds in ((1, 1.5), (8, 9.0), *[(1, 1.5), (8, 1.6)] * 3):
        throughput.add_draft(2.0, Timings([0.1] * steps, seconds))
    assert throughput.slope < 0.05


@pytest.mark.parametrize("wide", [0.1, 90.0])
def test_a_token_beside_others_costs_something_and_no_more_than_an_ordinary_step(
    wide: float,
) -> None:
    throughput = Throughput()
    throughput.add_ordinary(1.0)
    for steps, seconds in ((1, 1.5), (9, wide)) * 20:
        throughput.add_draft(2.0, Timings([0.1] * steps, seconds))
        assert 0 <= throughput.slope <= 1


def test_catching_up_is_no_part_of_a_steps_cost() -> None:
    throughput = Throughput()
    throughput.add_draft(3.0, Timings([9.0, 1.0, 1.0], 5.0))
    assert throughput.step.value == 1.0


def test_a_load_that_came_and_went_stops_a_good_draft_for_moments_only() -> None:
    world = WORLDS["processor, sure"]
    length = AdaptiveLength(24)
    for reply in replies(world, 5):
        decoded(length, world, reply)
    usual = sum(decoded(length, world, reply) for reply in replies(world, 5))
    length.throughputs[1].budget.drafts = -BUDGET_STEPS
    for reply in replies(world, 2):
        # Cycles that are four times as long, while ordinary steps are believed to be as before.
        decoded(length, world, reply, lambda: 4.0)
    taken = sum(decoded(length, world, reply) for reply in replies(world, 5))
    assert taken < 1.1 * usual


def test_a_step_after_a_draft_that_takes_longer_makes_no_draft_pay() -> None:
    throughput, drafts, drafted = Throughput(), 0, False
    for _ in range(600):
        drafted, before = throughput.should_draft(pays=throughput.pays, lag=0), drafted
        if drafted:
            # 1.6 tokens in the time of 1.75 steps that follow one another.
            throughput.add_draft(1.6, Timings([0.25], 1.5))
            drafts += 1
        else:
            throughput.add_ordinary(1.25 if before else 1.0)
    assert throughput.ordinary.value == pytest.approx(1.0, abs=0.05)
    assert drafts < 100


def test_long_drafts_do_not_put_off_the_measuring_of_ordinary_steps() -> None:
    throughput = Throughput()
    # The machine was busy at first, so drafts seem to pay.
    for _ in range(2):
        throughput.add_ordinary(1.5)
    drafts = 0
    while throughput.ordinary.value > 1.1 and drafts < 100:
        if throughput.wants_ordinary:
            throughput.add_ordinary(1.0)
        else:
            throughput.add_draft(18.0, Timings([0.8] * 17, 4.4))
            drafts += 1
    assert drafts < 30


def test_a_clock_that_stands_still_is_no_failure() -> None:
    length = taught(1, 0.0, 0.0, accepted=True)
    still = Throughput()
    for _ in range(3):
        still.add_ordinary(0.0)
        still.add_draft(2.0, Timings([0.0], 0.0))
    assert still.best == still.slope == 0
    assert still.should_draft(pays=still.pays, lag=0)
    assert length.should_continue(Progress([True], [[]], [100], [5], 1)) == [True]


def copying(
    length: DraftLength,
    right: Sequence[float],
    *,
    slope: float = 0.1,
    cycles: int = 400,
    step: float | None = None,
) -> tuple[float, list[int]]:
    """Decode where a copy of four tokens is offered in each cycle, without a drafter.

    Args:
        length: The rule.
        right: The chance that a copied token is right, in each half of the cycles.
        slope: What each further token of a verify costs, in ordinary steps.
        cycles: The number of cycles.
        step: The cost of a draft step whose tokens are always wrong; None for no drafter.

    Returns:
        Ordinary steps per token, and the number of copied tokens in each cycle.
    """
    chance, time, tokens, counts = random.Random(6), 0.0, 0, []
    for cycle in range(cycles):
        progress = Progress([True], [[]], [100], [9])
        steps: list[float] = []
        while True:
            [count] = length.should_copy(progress, [Offer(4, 2)])
            if count or step is None or not any(length.should_continue(progress)):
                break
            steps.append(step)
            progress.confidences[0].append(0.3)
        progress.copied[0] += range(2, 2 + count)
        accepted = 0
        if not steps:
            while accepted < count and chance.random() < right[cycle * len(right) // cycles]:
                accepted += 1
        verify = 1 + slope * (count + len(steps)) + (0.2 if count or steps else 0)
        length.update(progress, [accepted], Timings(steps, verify))
        counts.append(count)
        time, tokens = time + verify + sum(steps), tokens + accepted + 1
    return time / tokens, counts


@pytest.mark.parametrize("step", [None, 0.1])
def test_copies_are_made_where_they_pay(step: float | None) -> None:
    taken, counts = copying(AdaptiveLength(24), [0.9], step=step)
    assert taken < 0.45
    assert sum(counts) > 3 * len(counts)
    taken, counts = copying(AdaptiveLength(24), [0.02], step=step, cycles=1500)
    assert taken < 1.03
    # They are tried again, now and then, and used once they pay.
    taken, counts = copying(AdaptiveLength(24), [0.02, 0.9], step=step)
    assert sum(counts[:200]) < 100
    assert sum(counts[-100:]) > 300


def test_a_copy_is_as_long_as_it_pays() -> None:
    short = copying(AdaptiveLength(24), [0.6], slope=0.3)[1]
    long = copying(AdaptiveLength(24), [0.6], slope=0.02)[1]
    assert 0 < sum(short) < sum(long)


def test_a_copy_waits_for_a_drafter_that_promises_more() -> None:
    length = taught(1, 0.05, 0.05, accepted=True)
    progress = Progress([True], [[0.85]], [100], [9])
    for after, count in ((1.0, 0), (0.7, 20)):
        length.after_accepted = Mean(value=after)
        assert length.should_copy(progress, [Offer(1, 1)]) == [0]
        assert length.should_copy(progress, [Offer(20, 16)]) == [count]


def test_copies_are_judged_by_what_was_compared() -> None:
    for accepted, before, after in ((1, 0, 0), (2, 0, 1), (3, 1, 1), (4, 2, 0)):
        length = AdaptiveLength(6)
        progress = Progress([True], [[0.9, 0.9]], [100], [9])
        progress.copied[0] += [3, 4]
        length.update(progress, [accepted], Timings([0.1, 0.1], 1.0))
        right = [length.copy_acceptance(match) for match in (3, 4)]
        assert sum(mean.weight - PRIOR_TOKENS for mean in right) == before + after
        new = AdaptiveLength(6)
        risen = [m.value > new.copy_acceptance(n).value for n, m in zip((3, 4), right, strict=True)]
        assert sum(risen) == before


def test_a_row_without_a_copy_has_none() -> None:
    progress = Progress([True] * 3, [[] for _ in range(3)], [100] * 3, [9] * 3)
    offers = [Offer(20, 16), Offer(), Offer(2, 16)]
    for length in (FixedLength(6), ConfidenceLength(6, 0.5)):
        assert length.should_copy(progress, offers) == [6, 0, 2]
    # A third token costs all rows a place, and brings one of them a token.
    assert AdaptiveLength(6).should_copy(progress, offers) == [2, 0, 2]
    assert AdaptiveLength(6).should_copy(progress, [Offer()] * 3) == [0, 0, 0]
