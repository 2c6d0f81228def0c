"""The figures of an evaluation, computed by hand from a few answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.data.tasks import LOADERS
from fastvlm.data.tasks.captioning import Captioning
from fastvlm.evaluation.tasks.answers import Answer, Journal
from fastvlm.evaluation.tasks.curves import (
    acceptance_by_context,
    acceptance_by_position,
    charts,
    round_width,
)
from fastvlm.evaluation.tasks.plan import Plan
from fastvlm.evaluation.tasks.scores import HEADLINE_SCORES, Speed, headline, length_class, rows


def answer(
    strategy: str = "autoregressive",
    item: str = "0",
    tokens: int = 11,
    tpot: float | None = 10.0,
    cycles: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    text: str = "a small red square",
) -> Answer:
    return Answer(
        "flickr8k", item, None, strategy, text, tuple(range(tokens)), 20, 100.0, tpot, *cycles
    )


def test_speed_by_hand() -> None:
    slow = [answer(cycles=((0,) * 10, (0,) * 10)), answer(item="1", tokens=1, tpot=None)]
    fast = [
        answer("prompt-lookup:4", tpot=4.0, cycles=((4, 4, 2), (3, 2, 2))),
        answer("prompt-lookup:4", item="1", tokens=1, tpot=None),
    ]
    speed = Speed.of(fast, slow)
    assert speed.replies == 2
    assert speed.tokens.median == 6
    assert speed.ttft_ms.median == 100
    assert speed.tpot_ms is not None
    assert speed.tpot_ms.median == 4
    assert speed.decode_rate is not None
    assert speed.decode_rate.median == 250
    # 11 tokens in 140 ms, 1 in 100.
    assert speed.whole_rate.high == pytest.approx((11 / 0.14 + 3 * 1 / 0.1) / 4 + 2 * 17.142857)
    assert (speed.passes.low, speed.passes.high) == (1.75, 3.25)
    assert speed.acceptance_rate is not None
    assert speed.acceptance_rate.median == 7 / 10
    assert speed.acceptance_length is not None
    assert speed.acceptance_length.median == 10 / 3
    assert speed.draft_length is not None
    assert speed.draft_length.median == 10 / 3
    assert speed.speedup is not None
    assert speed.speedup.median == 2.5
    assert speed.speedup_end_to_end is not None
    assert speed.speedup_end_to_end.median == 200 / 140


def test_classes_of_length() -> None:
    assert [length_class(n) for n in (1, 4, 5, 8, 9, 16, 17, 100)] == [4, 4, 8, 8, 16, 16, 32, 128]


def test_every_task_has_a_headline() -> None:
    assert set(HEADLINE_SCORES) == {name.replace("_", "-") for name in LOADERS}
    assert headline("flickr8k:dev") == "CIDEr"
    assert headline("llava_wild") == "all"


def test_acceptance_against_context_and_position() -> None:
    # Drafts of 12 at contexts 21 and 30: 8 and then 3 of them accepted.
    found = acceptance_by_context("s", [answer(cycles=((12, 12), (8, 3)))])
    assert found is not None
    assert (found.x, found.y) == ([21.5, 30.5], [8 / 12, 3 / 12])
    twenty = [answer(cycles=((2, 1), (1, 1)))] * 20
    found = acceptance_by_position("s", twenty)
    assert found is not None
    assert (found.x, found.y) == ([1, 2], [1.0, 0.0])
    assert acceptance_by_position("s", twenty[:1]) is None


def test_round_widths() -> None:
    assert [round_width(w) for w in (0.1, 1, 1.5, 3, 7, 12, 60)] == [1, 1, 2, 5, 10, 20, 100]


def test_rows_and_charts_of_a_journal(
    planned: Callable[..., Plan], captions: Captioning, tmp_path: Path
) -> None:
    plan = planned({"flickr8k": captions})
    journal = Journal(tmp_path / "answers.jsonl", plan)
    for item in captions.items:
        [text] = captions.references[item.id]
        journal.add(answer(item=item.id, text=text, tpot=10.0))
        journal.add(
            answer("early-exit@2:3", item.id, text=text, tpot=5.0, cycles=((4,) * 4, (2, 1, 3, 0)))
        )
        other = item.id == "1"
        journal.add(
            answer(
                "prompt-lookup:4", item.id, 6 if other else 11, 20.0, text="dog" if other else text
            )
        )
    found = {row.strategy: row for row in rows(plan, journal, {})}
    best = found["autoregressive"].scores
    assert best is not None
    assert best["CIDEr"] == pytest.approx(10)
    assert found["early-exit@2:3"].scores == best
    assert (found["early-exit@2:3"].different, found["prompt-lookup:4"].different) == (0, 1)
    assert found["prompt-lookup:4"].scores is not None
    assert found["prompt-lookup:4"].scores["CIDEr"] < 10
    speed = found["early-exit@2:3"].by_length[16].speedup
    assert speed is not None
    assert speed.median == 2
    # A reply's class is its reference's, so that the classes are the same for all strategies.
    assert list(found["prompt-lookup:4"].by_length) == [16]
    drawn = {chart.name: chart for chart in charts(plan, journal, list(found.values()))}
    assert set(drawn) == {"acceptance_by_context", "acceptance_by_position", "speedup_by_length"}
    [curve] = drawn["acceptance_by_position"].curves
    assert (curve.label, curve.x) == ("early-exit@2:3", [1, 2, 3, 4])
    assert curve.y == [3 / 4, 2 / 4, 1 / 4, 0]
    slower = next(c for c in drawn["speedup_by_length"].curves if c.label == "prompt-lookup:4")
    assert slower.y == [pytest.approx(200 / 300)]
