"""An evaluation asks everything once, in turns, and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm.data.tasks import Item
from fastvlm.data.tasks.captioning import Captioning
from fastvlm.data.tasks.visdial import VisDial
from fastvlm.decoding import Strategy
from fastvlm.evaluation.tasks.answers import Answer, Journal, left_out
from fastvlm.evaluation.tasks.plan import Plan
from fastvlm.evaluation.tasks.runner import evaluate
from fastvlm.evaluation.tasks.scores import rows
from fastvlm.functional.errors import InputError
from fastvlm.vlm import VisionLanguageModel
from tests.evaluation.tasks.conftest import NAMES, lines

Planned = Callable[..., Plan]


def found(journal: Journal) -> dict[Any, Any]:
    """Return all that a journal holds but the times."""
    answers = {
        key: (one.text, list(one.tokens), list(one.proposed), list(one.accepted), one.prompt_tokens)
        for key, one in journal.answers.items()
    }
    return answers | {key: list(one.ratings) for key, one in journal.ratings.items()}


def quality(plan: Plan, journal: Journal) -> list[Any]:
    return [(row.task, row.strategy, row.scores, row.different) for row in rows(plan, journal, {})]


def test_every_strategy_answers_before_the_next_question_in_turns(
    vlm: VisionLanguageModel,
    strategies: dict[str, Strategy],
    planned: Planned,
    captions: Captioning,
    tmp_path: Path,
) -> None:
    plan = planned({"flickr8k": captions})
    journal = Journal(tmp_path / "answers.jsonl", plan)
    seen: list[tuple[int, int]] = []
    evaluate(vlm, strategies, plan, journal, lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    written = [line for line in lines(journal.file) if "strategy" in line]
    a, b, c = NAMES
    assert [line["strategy"] for line in written] == [a, b, c, b, c, a, c, a, b]
    assert [line["item"] for line in written] == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    for item in captions.items:
        whole = vlm.generate(
            item.prompt, item.open(), strategy=vlm.strategy("autoregressive"), max_new_tokens=10
        )
        for name in NAMES:
            answer = journal.answers["flickr8k", item.id, None, name]
            assert (answer.text, list(answer.tokens)) == (whole.text.strip(), whole.token_ids)
            assert answer.prompt_tokens == len(
                vlm.request(item.prompt, item.open()).prompt_token_ids
            )


@pytest.mark.parametrize("share", [0.0, 0.2, 0.45, 0.7, 0.95])
def test_an_interrupted_run_finds_out_the_same(
    vlm: VisionLanguageModel,
    strategies: dict[str, Strategy],
    planned: Planned,
    captions: Captioning,
    dialogue: VisDial,
    tmp_path: Path,
    share: float,
) -> None:
    plan = planned({"flickr8k": captions, "visdial": dialogue}, (None, 192))
    whole = Journal(tmp_path / "whole.jsonl", plan)
    evaluate(vlm, strategies, plan, whole)
    content = whole.file.read_bytes()
    file = tmp_path / "stopped.jsonl"
    kept = content[: max(len(content.split(b"\n")[0]) + 5, int(share * len(content)))]
    file.write_bytes(kept)
    stopped = Journal(file, plan)
    before = len(stopped.answers) + len(stopped.ratings)
    evaluate(vlm, strategies, plan, stopped)
    again = Journal(file, plan)
    assert found(again) == found(stopped) == found(whole)
    assert quality(plan, again) == quality(plan, whole)
    # What was known was not measured again.
    assert file.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    entries = [line for line in lines(file)[1:] if "session" not in line]
    assert len(entries) == len(whole.answers) + len(whole.ratings) >= before
    size = file.stat().st_size
    evaluate(vlm, strategies, plan, again)
    assert file.stat().st_size == size


def test_another_evaluations_journal_is_refused(
    planned: Planned, captions: Captioning, tmp_path: Path
) -> None:
    file = tmp_path / "answers.jsonl"
    Journal(file, planned({"flickr8k": captions}))
    with pytest.raises(InputError, match=r"another evaluation \(other sizes\)"):
        Journal(file, planned({"flickr8k": captions}, (64,)))
    with pytest.raises(InputError, match=r"another evaluation \(other tasks\)"):
        Journal(file, planned({"coco": captions}))


@pytest.mark.parametrize(
    ("line", "said"),
    [("{broken", "Line 2 of .* is not valid JSON"), ('{"task": 1}', "Line 2 of .* is no entry")],
)
def test_a_broken_journal_is_refused(
    planned: Planned, captions: Captioning, tmp_path: Path, line: str, said: str
) -> None:
    file = tmp_path / "answers.jsonl"
    plan = planned({"flickr8k": captions})
    Journal(file, plan)
    with file.open("a") as journal:
        journal.write(f"{line}\n")
    with pytest.raises(InputError, match=said):
        Journal(file, plan)


def test_what_fails_is_named_counted_and_left_out(
    vlm: VisionLanguageModel,
    strategies: dict[str, Strategy],
    planned: Planned,
    captions: Captioning,
    images: list[Path],
    tmp_path: Path,
) -> None:
    plan, file = planned({"flickr8k": captions}), tmp_path / "answers.jsonl"
    kept = images[1].read_bytes()
    images[1].unlink()
    with pytest.raises(InputError, match="flickr8k, item 1: There is no image"):
        evaluate(vlm, strategies, plan, Journal(file, plan))
    journal = Journal(file, plan)
    evaluate(vlm, strategies, plan, journal, max_failed=0.9)
    assert [failure.item for failure in journal.failures.values()] == ["1"]
    left = left_out(plan, journal)
    others = [item.id for item in captions.items if item.id != "1"]
    assert [item.id for item in left.tasks["flickr8k"].items] == others
    assert {key[1] for key in journal.answers} == set(others)
    assert all(row.speed.replies == len(others) for row in rows(left, journal, {}) if row.speed)
    # It is asked again when the run goes on.
    images[1].write_bytes(kept)
    again = Journal(file, plan)
    evaluate(vlm, strategies, plan, again)
    assert not again.failures
    assert left_out(plan, again).tasks == plan.tasks


def test_a_mended_item_is_counted_when_the_journal_is_read_again(
    vlm: VisionLanguageModel,
    strategies: dict[str, Strategy],
    planned: Planned,
    captions: Captioning,
    images: list[Path],
    tmp_path: Path,
) -> None:
    plan, file = planned({"flickr8k": captions}), tmp_path / "answers.jsonl"
    kept = images[1].read_bytes()
    images[1].unlink()
    evaluate(vlm, strategies, plan, Journal(file, plan), max_failed=0.9)
    images[1].write_bytes(kept)
    evaluate(vlm, strategies, plan, Journal(file, plan))
    finished = Journal(file, plan)
    assert not finished.failures
    assert left_out(plan, finished).tasks == plan.tasks


def test_a_task_that_fails_as_a_whole_is_left_out(
    vlm: VisionLanguageModel,
    strategies: dict[str, Strategy],
    planned: Planned,
    captions: Captioning,
    tmp_path: Path,
) -> None:
    gone = Captioning("Gone", (Item("x", "Describe.", tmp_path / "none.png"),), {"x": ["a"]})
    plan = planned({"flickr8k": captions, "coco": gone})
    journal = Journal(tmp_path / "answers.jsonl", plan)
    evaluate(vlm, strategies, plan, journal, max_failed=0.9)
    left = left_out(plan, journal)
    assert set(left.tasks) == {"flickr8k"}
    assert {row.task for row in rows(left, journal, {})} == {"flickr8k"}
    alone = planned({"coco": gone})
    journal = Journal(tmp_path / "alone.jsonl", alone)
    evaluate(vlm, strategies, alone, journal, max_failed=1.0)
    with pytest.raises(InputError, match="coco, item x"):
        left_out(alone, journal)


def test_the_contexts_of_cycles() -> None:
    # 20 tokens of prompt, one token from the prefill, then 2 accepted and 1 of the target's own.
    answer = Answer("t", "1", None, "s", "", (5,) * 6, 20, 1.0, 1.0, (3, 2), (2, 1))
    assert list(answer.cycles()) == [(21, 3, 2), (24, 2, 1)]
    assert answer.statistics.acceptance_length == 5 / 2
