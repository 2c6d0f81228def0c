"""Runs whose data is prepared by workers learn what runs without them do."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastvlm.checkpoints import load_checkpoint
from fastvlm.data.conversations import Broken, Conversation, Records
from fastvlm.prompts import question
from fastvlm.prompts.fastvithd import FastViTHDInputs
from fastvlm.training.draft import DraftTask, new_network
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.instruction import tune_model
from fastvlm.training.loop import train
from fastvlm.training.optimisation import seed_step, step_random
from fastvlm.training.paper_stages import PaperStage
from fastvlm.training.replies import TrainingPrompt, data_replies
from fastvlm.training.rows import RowMaker, TrainingRow, rows_for
from fastvlm.training.schedule import Schedule
from tests.models import small_vlm
from tests.processors import saved
from tests.training.children import Children, free_port, place_of
from tests.training.fed_run import SETTINGS
from tests.training.test_instruction import conversations, turn
from tests.training.test_loop import assert_same


def assert_same_rows(
    found: list[TrainingRow] | Broken, expected: list[TrainingRow] | Broken
) -> None:
    if isinstance(found, Broken) or isinstance(expected, Broken):
        assert found == expected
        return
    for one, other in zip(found, expected, strict=True):
        assert one.labels.equal(other.labels)
        assert one.inputs.keys() == other.inputs.keys()
        for name, tensor in one.inputs.items():
            assert tensor.equal(other.inputs[name])
            assert tensor.device.type == "cpu"


@pytest.mark.parametrize("family", ["fastvithd", "llava", "qwen2.5-vl", "idefics3"])
def test_what_makes_rows_can_be_sent_to_a_worker_without_the_model(
    family: str, tmp_path: Path
) -> None:
    if family == "fastvithd":
        vlm = small_vlm()
        model, processor = vlm.model, vlm.tokenizer
    else:
        saved(family, tmp_path / "model")
        model, processor = load_checkpoint(tmp_path / "model", torch.float64, "cpu")
    maker = RowMaker(rows_for(model, processor, None))
    packed = pickle.dumps(maker)
    # Neither the model nor its weights are in it, but for what a tokenizer is.
    assert len(packed) < 2 * len(pickle.dumps(processor)) + 20_000
    sent = pickle.loads(packed)
    unreadable = Conversation(
        "unreadable",
        ({**turn("user", "?"), "content": [{"type": "image", "image": "none.png"}]},),
    )
    for conversation in (*conversations(), unreadable):
        assert_same_rows(sent(conversation), maker(conversation))


def photo(number: int) -> bytes:
    data = io.BytesIO()
    Image.effect_noise((150 + number, 120), 60 + number).convert("RGB").save(data, "JPEG")
    return data.getvalue()


@pytest.mark.slow
def test_a_model_learns_the_same_with_workers(tmp_path: Path) -> None:
    made = [
        Conversation(
            f"{number}",
            (
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": photo(number) if number != 4 else b"cut"},
                        {"type": "text", "text": "What is it?"},
                    ],
                },
                turn("assistant", f"A number, {number}."),
            ),
        )
        for number in range(9)
    ]
    records = Records(made, lambda _, one: one, lambda _, one: one.name)
    stage = PaperStage("decoder", 0.05, None, 2, 1, "")
    schedule = Schedule(steps=3, learning_rate=0.05, warmup=0, weight_decay=0.0)
    for workers in (0, 1):
        vlm = small_vlm(torch.float32)
        output = tmp_path / str(workers)
        tune_model(
            vlm.model, vlm.tokenizer, records, stage, replace(schedule, workers=workers), output
        )
    alone, ahead = (
        torch.load(tmp_path / name / "training" / "checkpoint.pt", weights_only=True)
        for name in ("0", "1")
    )
    assert_same(ahead, alone)


@pytest.mark.slow
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_a_draft_learns_the_same_with_workers_which_open_its_images(
    kept_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = small_vlm(torch.float32)
    opened = []
    make = FastViTHDInputs.__call__
    monkeypatch.setattr(
        FastViTHDInputs, "__call__", lambda *given: opened.append(given) or make(*given)
    )
    examples = []
    for number in range(7):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(photo(number))
        asked = TrainingPrompt(
            path.name, tuple(question("What is it?", path)), f"{number} of them."
        )
        examples += data_replies(vlm, [asked])
    schedule = Schedule(steps=5, learning_rate=1e-3, warmup=0, log_seconds=0)
    learnt = []
    for workers in (0, 1):
        opened.clear()
        torch.manual_seed(3)
        network = new_network(vlm, DraftPlan("block", 2, draft_vocabulary=20), examples)
        task = DraftTask(vlm, {"it": network}, examples, batch=3, kept_bytes=kept_bytes)
        # Measuring what would fit into memory opens them all.
        task.target.keeps = False
        chosen = replace(schedule, workers=workers)
        with task.draws.ahead(chosen):
            train(task, chosen, tmp_path / str(workers))
        learnt.append(network.state_dict())
        number = 0 if workers else 15 if not kept_bytes else 7
        assert len(opened) == number
    assert_same(*map(dict, learnt))


def test_what_a_step_draws_is_known_ahead() -> None:
    for step in range(5):
        seed_step(3, step)
        drawn = random.sample(range(100), 7)
        ahead = step_random(3, step)
        ahead.getrandbits(63)
        assert drawn == ahead.sample(range(100), 7)


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    children = Children(tmp_path)
    yield children
    children.end()


def start(output: Path, **task: Any) -> list[subprocess.Popen[str]]:
    """Start a run of two processes, each a group of its own with its workers."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.fed_run", str(output), json.dumps(task)],
            env={**os.environ, **place_of(rank, 2, port)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]


def status(run: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [(one.wait(120), one.stderr.read() if one.stderr else "") for one in run]


@pytest.mark.slow
def test_a_run_with_workers_that_is_stopped_goes_on_as_if_it_had_not_been(
    children: Children, tmp_path: Path
) -> None:
    children.run(tmp_path / "alone", 2, task={"feeds": True}, **SETTINGS)
    output, task = tmp_path / "ahead", {"feeds": True, "workers": 1, "pause": 0.3}
    run = start(output, **task)
    try:
        until = time.monotonic() + 90
        while not (output / "log.jsonl").exists():
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(0.5)
        # As a scheduler does: the workers are told, too.
        for one in run:
            os.killpg(one.pid, signal.SIGTERM)
        for code, said in status(run):
            assert code == 3, said
            assert "StoppedError" in said
            assert "Traceback" not in said
        step = torch.load(output / "checkpoint.pt", weights_only=True)["step"]
        assert 0 < step < SETTINGS["steps"]
        run = start(output, **{**task, "pause": 0})
        for code, said in status(run):
            assert code == 0, said
    finally:
        for one in run:
            one.kill()
    ended, alone = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("ahead", "alone")
    )
    assert_same(ended, alone)
