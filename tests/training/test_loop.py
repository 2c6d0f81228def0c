"""The loop: a run that stops in any way goes on exactly where it stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvlm.functional.errors import CheckpointError, StorageError
from fastvlm.training.checkpoint import before, write_checkpoint
from fastvlm.training.loop import StoppedError, train
from fastvlm.training.optimisation import parameter_groups, seed_step
from fastvlm.training.schedule import Schedule
from fastvlm.training.task import Losses
from fastvlm.vision.layers import LayerScale

SCHEDULE = Schedule(steps=20, learning_rate=0.05, warmup=5, checkpoint_seconds=0)


class Fit:
    """Fits noise drawn from torch's and Python's generators, with a buffer and a dropout."""

    def __init__(self, before: Callable[[int], None] | None = None) -> None:
        torch.manual_seed(7)
        self.module: nn.Module = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2)
        )
        self.module[0].rate_scale = 0.5
        self.before = before
        self.steps: list[int] = []
        self.unit, self.source, self.whole = "rows", None, "its batch norm sees all of a step"
        self.plan: dict[str, Any] = {}

    def draw(self, step: int) -> Tensor:
        self.steps.append(step)
        if self.before is not None:
            self.before(step)
        return torch.randn(8, 3) * random.uniform(0.5, 2.0)

    def loss(self, examples: Tensor) -> Losses:
        loss = (self.module(examples) - examples[:, :2]).square().mean(1).sum()
        rows = len(examples)
        return Losses(loss, rows, {"twice": (2 * loss.item(), rows)})


def at(step: int, act: Callable[[], object]) -> Callable[[int], None]:
    """Do something at one step of a run."""

    def before(reached: int) -> None:
        if reached == step:
            act()

    return before


def fail() -> None:
    raise ZeroDivisionError("a step fails")


def ended(output: Path) -> dict[str, Any]:
    return torch.load(output / "checkpoint.pt", weights_only=True)


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, through dictionaries and lists."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The output of a run that nothing stopped."""
    train(Fit(), SCHEDULE, tmp_path / "whole")
    return tmp_path / "whole"


def test_a_run_depends_on_its_seed_alone(whole: Path, tmp_path: Path) -> None:
    random.seed(99)
    train(Fit(), SCHEDULE, tmp_path / "again")
    assert_same(ended(tmp_path / "again"), ended(whole))
    train(Fit(), dataclasses.replace(SCHEDULE, seed=1), tmp_path / "other")
    before, other = ended(whole)["module"], ended(tmp_path / "other")["module"]
    assert not torch.equal(before["0.weight"], other["0.weight"])


def test_a_failed_run_goes_on_where_it_stopped(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "failed"
    for step in (3, 4, 11):
        with pytest.raises(ZeroDivisionError):
            train(Fit(at(step, fail)), SCHEDULE, output)
    assert ended(output)["step"] == 11
    task = Fit()
    train(task, SCHEDULE, output)
    assert task.steps == list(range(11, 20))
    assert_same(ended(output), ended(whole))
    assert_same(task.module.state_dict(), ended(whole)["module"])


def test_a_failed_run_repeats_what_no_checkpoint_holds(whole: Path, tmp_path: Path) -> None:
    seldom = dataclasses.replace(SCHEDULE, checkpoint_seconds=1000)
    with pytest.raises(ZeroDivisionError):
        train(Fit(at(13, fail)), seldom, tmp_path)
    task = Fit()
    train(task, seldom, tmp_path)
    assert task.steps == list(range(20))
    assert_same(ended(tmp_path), ended(whole))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_stopped(
    number: signal.Signals, whole: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    output = tmp_path / "stopped"
    seldom = dataclasses.replace(SCHEDULE, checkpoint_seconds=1000)
    with pytest.raises(StoppedError, match="after step 8 of 20"):
        train(Fit(at(7, lambda: os.kill(os.getpid(), number))), seldom, output)
    assert signal.getsignal(number) is before
    assert ended(output)["step"] == 8
    task = Fit()
    train(task, seldom, output)
    assert task.steps == list(range(8, 20))
    assert signal.getsignal(number) is before
    assert_same(ended(output), ended(whole))


def test_a_finished_run_is_left_alone(whole: Path) -> None:
    before = ended(whole)
    task = Fit(fail)
    train(task, SCHEDULE, whole)
    assert task.steps == []
    assert_same(task.module.state_dict(), before["module"])
    assert_same(ended(whole), before)


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 21},
        {"seed": 1},
        {"learning_rate": 0.06},
        {"warmup": 6},
        {"weight_decay": 0.0},
        {"clip": 2.0},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_checkpoint_of_another_schedule_is_refused(other: dict[str, Any], whole: Path) -> None:
    before = (whole / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt was made by a run with"):
        train(Fit(fail), dataclasses.replace(SCHEDULE, **other), whole)
    assert (whole / "checkpoint.pt").read_bytes() == before


def test_how_often_to_write_may_change(whole: Path) -> None:
    train(Fit(), dataclasses.replace(SCHEDULE, checkpoint_seconds=5, log_seconds=5), whole)


def test_a_checkpoint_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep" / "checkpoint.pt"
    write_checkpoint(file, {"step": 1, "x": torch.arange(5)})
    save = torch.save

    def interrupted(state: Any, path: Path) -> None:
        save(state, path)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(StorageError):
        write_checkpoint(file, {"step": 2, "x": torch.arange(6)})
    monkeypatch.undo()
    assert_same(torch.load(file, weights_only=True), {"step": 1, "x": torch.arange(5)})
    write_checkpoint(file, {"step": 3})
    assert torch.load(file, weights_only=True) == {"step": 3}
    # The one before it is kept, in case that the last one is cut.
    assert torch.load(before(file), weights_only=True)["step"] == 1
    assert {path.name for path in file.parent.iterdir()} == {file.name, before(file).name}


def test_the_rate_warms_up_and_falls_to_a_fiftieth() -> None:
    schedule = Schedule(steps=110, learning_rate=2.0, warmup=10)
    rates = [schedule.rate(step) for step in range(115)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == pytest.approx(2.0)
    assert all(after < before for before, after in itertools.pairwise(rates[10:111]))
    assert rates[60] == pytest.approx(2.0 * 0.51)
    assert rates[35] == pytest.approx(2.0 * (0.02 + 0.49 * (1 + math.sqrt(0.5))))
    assert rates[110:] == pytest.approx([0.04] * 5)


def test_a_run_may_begin_at_its_peak() -> None:
    assert Schedule(steps=10, learning_rate=3.0, warmup=0).rate(0) == pytest.approx(3.0)
    # Too short to warm up.
    short = Schedule(steps=4, learning_rate=1.0, warmup=8)
    assert [short.rate(step) for step in range(4)] == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])


def test_matrices_and_kernels_decay_and_the_rest_does_not() -> None:
    inner = nn.Sequential(nn.Linear(4, 5), LayerScale(5, 1.0))
    outer = nn.ModuleDict({
        "inner": inner,
        "conv": nn.Conv2d(5, 5, 3, groups=5),
        "norm": nn.BatchNorm2d(5),
        "plain": nn.Linear(5, 5, bias=False),
        "frozen": nn.Linear(5, 5).requires_grad_(False),
    })  # fmt: skip
    outer.tied = outer["plain"]
    outer["conv"].rate_scale = 0.3
    inner.rate_scale = 0.1
    inner[0].rate_scale = 2.0  # the innermost counts
    groups = parameter_groups(outer, 0.05)
    names = {parameter: name for name, parameter in outer.named_parameters()}
    found = {
        (group["weight_decay"], group["rate_scale"]): {names[p] for p in group["params"]}
        for group in groups
    }
    assert found == {
        (0.05, 2.0): {"inner.0.weight"},
        (0.0, 2.0): {"inner.0.bias"},
        (0.0, 0.1): {"inner.1.gamma"},
        (0.05, 0.3): {"conv.weight"},
        (0.0, 0.3): {"conv.bias"},
        (0.0, 1.0): {"norm.weight", "norm.bias"},
        (0.05, 1.0): {"plain.weight"},
    }
    assert sum(len(group["params"]) for group in groups) == 8


def test_each_group_trains_at_its_multiple_of_the_rate(whole: Path) -> None:
    rates = [group["lr"] for group in ended(whole)["optimiser"]["param_groups"]]
    last = SCHEDULE.rate(19)
    assert sorted(rates) == pytest.approx([0.5 * last] * 2 + [last] * 2)


def test_a_step_draws_what_its_number_decides() -> None:
    draws = {}
    for seed in (0, 1):
        for step in (0, 1, 2):
            seed_step(seed, step)
            draws[seed, step] = (torch.rand(()).item(), random.random())
    assert len({pair[0] for pair in draws.values()}) == len(draws)
    assert len({pair[1] for pair in draws.values()}) == len(draws)
    seed_step(1, 2)
    assert draws[1, 2] == (torch.rand(()).item(), random.random())


def test_the_log_holds_every_steps_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seldom = dataclasses.replace(SCHEDULE, checkpoint_seconds=1000)
    train(Fit(), dataclasses.replace(seldom, log_seconds=0), tmp_path)
    train(Fit(), dataclasses.replace(seldom, log_seconds=1000), tmp_path / "once")
    each = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    [once] = [json.loads(line) for line in (tmp_path / "once/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in each] == list(range(1, 21))
    assert once["step"] == 20
    for name in ("loss", "twice"):
        assert once[name] == pytest.approx(sum(line[name] for line in each) / 20)
    assert once["twice"] == pytest.approx(2 * once["loss"])
    assert "step 20/20" in capsys.readouterr().err
