"""What a run tells: the log, the curves, trackers, and what decoding held-out images says."""

from __future__ import annotations

import gc
import json
import resource
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvlm.data.broken import BrokenRecords
from fastvlm.data.questions import scene_conversations
from fastvlm.functional.errors import InputError
from fastvlm.training import progress
from fastvlm.training.curves import read_curves
from fastvlm.training.draft import DraftTask, new_network
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.loop import train
from fastvlm.training.progress import keep_until
from fastvlm.training.replies import Example, TrainingPrompt, own_replies, questions_of
from fastvlm.training.schedule import Schedule
from fastvlm.training.validation import HeldOut
from fastvlm_example import HELD_OUT_SCENES
from tests.models import small_vlm
from tests.training.children import Rows
from tests.training.test_loop import Fit

SCHEDULE = Schedule(steps=12, learning_rate=0.05, warmup=5, log_seconds=0)


def test_the_line_has_the_measures_the_speed_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Rows(pause=0.01), SCHEDULE, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12
    assert lines[3].startswith("step 4/12  loss ")
    for part in ("  rare 0.", " tokens/s  0:0", " left"):
        assert part in lines[3]
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last.keys() == {"step", "loss", "rare", "tokens/s"}
    # Seven rows of one to four tokens, drawn every 10 ms and more.
    assert 0 < last["tokens/s"] < 2800


def test_measures_are_means_over_all_that_they_count(tmp_path: Path) -> None:
    train(Rows(), SCHEDULE, tmp_path / "each")
    seldom = Schedule(steps=12, learning_rate=0.05, warmup=5)
    train(Rows(), seldom, tmp_path / "once")
    each, once = (read_curves(tmp_path / name / "log.jsonl") for name in ("each", "once"))
    rare = [value for _, value in each["rare"]["rare"]]
    assert once["rare"]["rare"] == [(12, pytest.approx(sum(rare) / 12))]
    # Steps of more tokens weigh more.
    losses = [value for _, value in each["loss"]["loss"]]
    assert min(losses) < once["loss"]["loss"][0][1] < max(losses)


def test_validation_and_curves_are_in_the_output(tmp_path: Path) -> None:
    called = []

    def validate(step: int) -> dict[str, float]:
        called.append(step)
        torch.manual_seed(0)  # as decoding may
        return {"held-out acceptance_rate": step / 12}

    schedule = Schedule(steps=12, learning_rate=0.05, warmup=5, log_seconds=0, validation_steps=5)
    train(Rows(), schedule, tmp_path / "validated", validate)
    assert called == [5, 10, 12]
    curves = read_curves(tmp_path / "validated" / "log.jsonl")
    assert curves["acceptance_rate"] == {
        "held-out acceptance_rate": [(step, step / 12) for step in (5, 10, 12)]
    }
    with Image.open(tmp_path / "validated" / "curves.png") as image:
        assert image.size[0] > 500
        assert len(image.convert("L").getcolors()) > 10
    # It leaves no trace in what is learnt.
    train(Rows(), SCHEDULE, tmp_path / "blind")
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt")["module"] for name in ("validated", "blind")
    )
    assert all(one[name].equal(other[name]) for name in one)


def test_without_matplotlib_the_run_ends_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(Rows(), SCHEDULE, tmp_path)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "The curves are not drawn without matplotlib: pip install 'fastvlm[plots]'."
    assert not (tmp_path / "curves.png").exists()


def test_the_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (5, 10, 15)]
    log.write_text("".join(lines) + '{"step": 2')
    keep_until(log, 10)
    assert log.read_text() == "".join(lines[:2])


def test_a_run_that_went_on_logs_each_step_once(tmp_path: Path) -> None:
    broken = Rows()
    loss = broken.loss
    broken.loss = lambda examples: loss(examples) if next(left) else 1 / 0  # type: ignore[assignment]
    left = iter([True] * 8 + [False])
    often = replace(SCHEDULE, checkpoint_seconds=0.0)
    with pytest.raises(ZeroDivisionError):
        train(broken, often, tmp_path)
    train(Rows(), often, tmp_path)
    assert [step for step, _ in read_curves(tmp_path / "log.jsonl")["loss"]["loss"]] == list(
        range(1, 13)
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"trackers": ("aim",)}, "The trackers are tensorboard, wandb, trackio; got aim"),
        ({"trackers": ("wandb",)}, "The tracker wandb is not installed: pip install wandb"),
        ({"accumulation": 8}, "A step has 7 examples, which can't be cut into 8 slices"),
    ],
)
def test_what_a_run_can_not_do_is_said(
    changed: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "get_available_trackers", list)
    with pytest.raises(InputError, match=said):
        train(Rows(), replace(SCHEDULE, **changed), tmp_path)


def test_what_must_stay_whole_is_not_cut(tmp_path: Path) -> None:
    schedule = Schedule(steps=2, learning_rate=0.05, accumulation=2)
    with pytest.raises(InputError, match="by one process without accumulation: its batch norm"):
        train(Fit(), schedule, tmp_path)


def test_a_step_with_nothing_to_learn_is_said(tmp_path: Path) -> None:
    class Nothing(Rows):
        def draw(self, _: int) -> list[tuple[torch.Tensor, int]]:
            return [(torch.zeros(3), 0)]

    with pytest.raises(InputError, match="nothing to learn from in the examples of step 1"):
        train(Nothing(), SCHEDULE, tmp_path)


def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    train(Rows(), replace(SCHEDULE, trackers=("tensorboard",)), tmp_path)
    [events, *_] = [
        p for p in (tmp_path / "trackers").rglob("*tfevents*") if p.stat().st_size > 200
    ]
    assert b"tokens/s" in events.read_bytes()


def asked_of(seeds: range, size: int) -> list[TrainingPrompt]:
    return questions_of(scene_conversations(seeds, size), BrokenRecords())


def test_held_out_questions_are_decoded_with_the_network(tmp_path: Path) -> None:
    vlm = small_vlm(torch.float32)
    asked = asked_of(range(HELD_OUT_SCENES, HELD_OUT_SCENES + 4), vlm.image_size)
    told = own_replies(vlm, asked, tmp_path, BrokenRecords(), max_new_tokens=24)
    plan = DraftPlan("block", 3, draft_vocabulary=150)
    before = new_network(vlm, plan, told)
    measures = HeldOut(vlm, {"block": before}, asked, max_new_tokens=24)(1)
    strategy = vlm.strategy("imitation", network=before, num_speculative_tokens=4, confidence=0.0)
    accepted = proposed = cycles = 0
    for one in asked:
        alone = vlm.request(one.messages, strategy=strategy, max_new_tokens=24)
        [request] = vlm.engine.run([alone])
        accepted += sum(request.accepted)
        proposed += sum(request.proposed)
        cycles += len(request.proposed)
    plain = [
        vlm.generate(one.messages, strategy="autoregressive", max_new_tokens=24) for one in asked
    ]
    tokens = sum(len(reply.token_ids) - 1 for reply in plain)
    assert measures == {
        "held-out block acceptance_rate": pytest.approx(accepted / proposed),
        "held-out block acceptance_length": pytest.approx(tokens / cycles),
    }
    assert proposed > accepted


def resident() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow
def test_memory_does_not_grow_over_a_thousand_steps(tmp_path: Path) -> None:
    vlm = small_vlm(torch.float32)
    asked = asked_of(range(8), vlm.image_size)
    told = own_replies(vlm, asked, tmp_path, BrokenRecords(), max_new_tokens=12)
    network = new_network(vlm, DraftPlan("block", 2, draft_vocabulary=60), told)
    seen: list[tuple[int, int]] = []

    class Watched(DraftTask):
        def draw(self, step: int) -> list[Example]:
            if step in (100, 1099):
                gc.collect()
                seen.append((tracemalloc.get_traced_memory()[0], resident()))
            return super().draw(step)

    task = Watched(vlm, {"it": network}, told, batch=4)
    tracemalloc.start()
    schedule = Schedule(steps=1100, learning_rate=1e-3, checkpoint_seconds=2, log_seconds=0.5)
    train(task, schedule, tmp_path / "run")
    tracemalloc.stop()
    [(python, whole), (python_later, whole_later)] = seen
    assert python_later - python < 2**19
    assert whole_later - whole < 20 * 2**10
