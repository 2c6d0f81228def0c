"""Processes that share a run, and kills at any moment: nothing of it shows in the weights."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvlm.functional.errors import CheckpointError
from fastvlm.training.loop import train
from fastvlm.training.schedule import Schedule
from tests.training.children import Children, Rows
from tests.training.test_loop import assert_same

SLOWLY = {"pause": 0.01}


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    children = Children(tmp_path)
    yield children
    children.end()


def ended(output: Path) -> dict[str, Any]:
    return torch.load(output / "checkpoint.pt", weights_only=True)


def curve(output: Path, name: str) -> list[float]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines)]


def wait_for(output: Path, processes: list[BaseProcess]) -> None:
    """Wait for the first checkpoint."""
    until = time.monotonic() + 60
    while not (output / "checkpoint.pt").exists():
        assert time.monotonic() < until
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_learn_as_one_with_twice_the_accumulation(
    accumulation: int, children: Children, tmp_path: Path
) -> None:
    how = {"steps": 30, "log_seconds": 0}
    children.run(tmp_path / "two", 2, accumulation=accumulation, **how)
    children.run(tmp_path / "one", accumulation=2 * accumulation, **how)
    for name in ("loss", "rare"):
        two, one = curve(tmp_path / "two", name), curve(tmp_path / "one", name)
        assert len(two) == 30
        assert two == pytest.approx(one, rel=1e-4)
    two, one = (ended(tmp_path / name)["module"] for name in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    # Nothing is learnt, and nothing decays, where there was no gradient.
    assert two["never.weight"].equal(Rows().module["never"].weight)
    assert not two["seldom.weight"].equal(Rows().module["seldom"].weight)


def test_accumulation_changes_the_gradient_by_rounding_alone(tmp_path: Path) -> None:
    losses = []
    for accumulation in (1, 3, 7):
        task = Rows()
        task.module["net"][1].p = 0.0  # what is dropped differs from slice to slice
        schedule = Schedule(
            steps=15, learning_rate=0.05, warmup=5, accumulation=accumulation, log_seconds=0
        )
        train(task, schedule, tmp_path / str(accumulation))
        losses.append(curve(tmp_path / str(accumulation), "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_a_lost_process_ends_the_run_with_a_sentence(children: Children, tmp_path: Path) -> None:
    for lost in (0, 1):
        output = tmp_path / f"lost-{lost}"
        processes = children.start(output, 2, steps=10_000, checkpoint_seconds=0.1, task=SLOWLY)
        wait_for(output, processes)
        processes[lost].kill()
        other = processes[1 - lost]
        other.join(20)
        assert other.exitcode == 3
        told = children.said(1 - lost).read_text().splitlines()[-1]
        assert told.startswith(f"LostProcessError: Process {1 - lost} of 2 has lost another one")


def test_a_signal_to_one_process_stops_all(children: Children, tmp_path: Path) -> None:
    task = {"feeds": True}
    children.run(tmp_path / "whole", 2, steps=200, task=task)
    output = tmp_path / "stopped"
    processes = children.start(
        output, 2, steps=200, checkpoint_seconds=0.05, task={**task, **SLOWLY}
    )
    wait_for(output, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    for rank, process in enumerate(processes):
        process.join(20)
        assert process.exitcode == 3
        assert "StoppedError: Stopped after step" in children.said(rank).read_text()
    assert 0 < ended(output)["step"] < 200
    children.run(output, 2, steps=200, task=task)
    assert_same(ended(output), ended(tmp_path / "whole"))
    # Between them they have read as many records as each has taken.
    positions = ended(output)["streams"]
    assert [position["process"] for position in positions] == [0, 1]
    assert all(position["broken"]["seen"] == 600 for position in positions)


def kill_at_random(
    children: Children, output: Path, number: int, kills: int, task: dict[str, Any]
) -> None:
    """Kill a run so many times, resumed each time, and let it end."""
    steps, moments = 150, random.SystemRandom()
    slowly = {**task, "pause": 0.02}
    reached = []
    for _ in range(kills):
        processes = children.start(output, number, steps=steps, checkpoint_seconds=0, task=slowly)
        before = reached[-1] if reached else 0
        until = time.monotonic() + 60
        # At least a step further, so that the kills are spread over the run.
        while not (output / "checkpoint.pt").exists() or ended(output)["step"] <= before:
            assert time.monotonic() < until, children.said(0).read_text()
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.25))
        for process in processes:
            process.kill()
            process.join()
        reached.append(ended(output)["step"])
    assert reached == sorted(reached)
    assert len(set(reached)) == kills
    assert reached[-1] < steps
    children.run(output, number, steps=steps, task=task)


@pytest.mark.parametrize(
    ("number", "kills", "feeds"),
    [
        (1, 2, False),
        (2, 2, True),
        pytest.param(1, 10, True, marks=pytest.mark.slow),
        pytest.param(2, 10, False, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_a_run_ends_where_it_would_have(
    number: int, kills: int, feeds: bool, children: Children, tmp_path: Path
) -> None:
    task = {"feeds": feeds}
    kill_at_random(children, tmp_path / "killed", number, kills, task)
    children.run(tmp_path / "whole", number, steps=150, task=task)
    assert_same(ended(tmp_path / "killed"), ended(tmp_path / "whole"))


def test_streams_go_on_with_as_many_processes(tmp_path: Path) -> None:
    schedule = Schedule(steps=5, learning_rate=0.05)
    train(Rows(feeds=True), schedule, tmp_path)
    state = ended(tmp_path)
    torch.save({**state, "streams": state["streams"] * 2}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="made by 2 processes with a stream of data each"):
        train(Rows(feeds=True), schedule, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["", "Linear"])
def test_sharded_weights_are_learnt_and_resumed_as_whole_ones_are(
    layers: str, children: Children, tmp_path: Path
) -> None:
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if layers:
        sharded |= {"FSDP_TRANSFORMER_CLS_TO_WRAP": layers}
    # All processes need all weights in a step.
    task = {"rare": 1}
    how = {"steps": 30, "log_seconds": 0, "task": task}
    children.run(tmp_path / "whole", 2, **how)
    children.run(tmp_path / "sharded", 2, environment=sharded, **how)
    for name in ("loss", "rare"):
        found, expected = curve(tmp_path / "sharded", name), curve(tmp_path / "whole", name)
        assert found == pytest.approx(expected, rel=1e-4)
    whole, found = ended(tmp_path / "whole"), ended(tmp_path / "sharded")
    torch.testing.assert_close(found["module"], whole["module"], rtol=1e-3, atol=1e-5)
    output = tmp_path / "stopped"
    processes = children.start(
        output,
        2,
        environment=sharded,
        checkpoint_seconds=0.05,
        **{**how, "task": {**task, **SLOWLY}},
    )
    wait_for(output, processes)
    for process in processes:
        process.kill()
        process.join()
    assert 0 < ended(output)["step"] < 30
    children.run(output, 2, environment=sharded, **how)
    # Resuming gives weights that never had a gradient a state of zeros.
    assert_same(ended(output)["module"], found["module"])
