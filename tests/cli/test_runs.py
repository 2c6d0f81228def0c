"""Runs of the verbs that train: resumed with the same options alone, on whatever disk."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvlm.cli.verbs import command as root
from fastvlm.training import checkpoint, loop
from tests.cli.conftest import Output
from tests.training import teachers

Cli = Callable[..., Output]

DRAFT = {
    "--data": "scenes:4", "--held-out": "1", "--steps": "2", "--exit-layer": "1",
    "--max-new-tokens": "16",
}  # fmt: skip
ENCODER = {
    "--teacher": f"{teachers.FILE}:grid", "--held-out": "2", "--steps": "2", "--batch": "2",
    "--image-size": "64", "--workers": "0",
}  # fmt: skip
MODEL = {"--steps": "2", "--batch": "2", "--image-size": "128"}
OTHER_DRAFT: dict[str, tuple[str, ...]] = {
    "--data": ("--data", "scenes:5"),
    "--limit": ("--limit", "3"),
    "--replies": ("--replies", "data"),
    "--temperature": ("--temperature", "1"),
    "--max-new-tokens": ("--max-new-tokens", "9"),
    "--kind": ("--kind", "mlp"),
    "--exit-layer": ("--exit-layer", "2"),
    "--blocks": ("--blocks", "2"),
    "--draft-vocabulary": ("--draft-vocabulary", "3"),
    "--random-start": ("--random-start",),
    "--cosine": ("--cosine", "0.3"),
    "--cross-entropy": ("--cross-entropy", "0"),
    "--held-out": ("--held-out", "2"),
    "--steps": ("--steps", "3"),
    "--learning-rate": ("--learning-rate", "0.01"),
    "--seed": ("--seed", "8"),
    "--dtype": ("--dtype", "float64"),
}
"""Options of `train draft` that decide what is learnt, each with another value."""
OTHER_MODEL: dict[str, tuple[str, ...]] = {
    "--learns": ("--learns", "projector"),
    "--objective": ("--objective", "words"),
    "--image-size": ("--image-size", "192"),
    "--batch": ("--batch", "3"),
    "--steps": ("--steps", "3"),
    "--learning-rate": ("--learning-rate", "0.01"),
    "--seed": ("--seed", "8"),
}
"""Options of `train model` that decide what is learnt, each with another value."""
OTHER_ENCODER: dict[str, tuple[str, ...]] = {
    "--limit": ("--limit", "4"),
    "--held-out": ("--held-out", "3"),
    "--image-size": ("--image-size", "128"),
    "--batch": ("--batch", "3"),
    "--smallest-crop": ("--smallest-crop", "0.7"),
    "--mixup": ("--mixup", "1"),
    "--teacher": ("--teacher", f"{teachers.FILE}:vector"),
    "--teacher-size": ("--teacher-size", "64"),
    "--teacher-mean": ("--teacher-mean", "0,0,0"),
    "--teacher-std": ("--teacher-std", "1,1,1"),
    "--steps": ("--steps", "3"),
    "--learning-rate": ("--learning-rate", "0.01"),
    "--seed": ("--seed", "8"),
}
"""Options of `train encoder` that decide what is learnt, each with another value."""
ELSEWHERE = {
    # What is trained, tested by itself below, or the place of the run.
    "--output", "--model", "--encoder", "--decoder", "--start", "--variant", "--prompt", "--help",
    # Accelerate has one for a process; it is part of the schedule, and so of the plan.
    "--dtype",
    # Another phase or stage with a folder, a schedule or figures of its own, which the plan holds.
    "--phases", "--exit-weight", "--joint-steps", "--joint-learning-rate", "--stage", "--epochs",
    "--lora-rank",
    # How it is computed and told.
    "--accumulation", "--gradient-checkpointing", "--tracker", "--device", "--threads", "--quiet",
    "--json", "--workers",
}  # fmt: skip
FAST = ("--data", "--kind", "--exit-layer")


def words(verb: str, options: dict[str, str], output: Path, *more: object) -> list[object]:
    given = [part for pair in options.items() for part in pair]
    return ["train", verb, *given, "--output", output, *more]


@pytest.fixture
def drafted(cli: Cli, tmp_path: Path) -> Path:
    """Return the output of a finished run of `train draft`."""
    output = tmp_path / "run"
    said = cli(*words("draft", DRAFT, output))
    assert said.code == 0, said.err
    return output


def options_of(*verb: str) -> set[str]:
    """Return the names of a verb's options."""
    command: Any = root()
    for name in verb:
        command = command.commands[name]
    found = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    return {name for name in found if name.startswith("--")}


@pytest.mark.parametrize(
    ("verb", "known"),
    [("draft", OTHER_DRAFT), ("model", OTHER_MODEL), ("encoder", OTHER_ENCODER)],
)
def test_every_option_decides_or_is_known_not_to(verb: str, known: dict[str, Any]) -> None:
    # An option that is new is put where it belongs.
    assert options_of("train", verb) <= known.keys() | ELSEWHERE | {"--data"}


def refused(said: Output) -> None:
    """Check that a run with other options was refused in a sentence."""
    assert said.code == 1
    [sentence] = [line for line in said.err.splitlines() if line.startswith("fastvlm: ")]
    assert "another output" in sentence


def other(
    verb: str, options: dict[str, str], output: Path, change: tuple[str, ...]
) -> list[object]:
    changed = {name: value for name, value in options.items() if name != change[0]}
    return words(verb, changed, output, *change)


@pytest.mark.parametrize("option", FAST)
def test_a_draft_is_not_resumed_as_another(cli: Cli, drafted: Path, option: str) -> None:
    weights = load_file(drafted / "block" / "model.safetensors")
    refused(cli(*other("draft", DRAFT, drafted, OTHER_DRAFT[option])))
    after = load_file(drafted / "block" / "model.safetensors")
    assert all(weights[name].equal(after[name]) for name in weights)


@pytest.mark.slow
def test_no_option_of_a_draft_changes_on_the_way(cli: Cli, drafted: Path, shipped: Path) -> None:
    for option, change in OTHER_DRAFT.items():
        if option not in FAST:
            refused(cli(*other("draft", DRAFT, drafted, change)))
    refused(cli(*words("draft", DRAFT, drafted, "--model", shipped / "other")))
    refused(cli(*words("draft", DRAFT, drafted, "--start", drafted)))
    assert cli(*words("draft", DRAFT, drafted)).code == 0


@pytest.mark.slow
def test_no_option_of_a_model_changes_on_the_way(cli: Cli, tmp_path: Path, shipped: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        shutil.copy(shipped / "images" / "0.png", data / f"{number}.png")
        (data / f"{number}.txt").write_text("A red square.")
    output, model = tmp_path / "run", ("--model", shipped / "model", "--data", data)
    assert cli(*words("model", MODEL, output, *model)).code == 0
    for change in OTHER_MODEL.values():
        refused(cli(*other("model", MODEL, output, change), *model))
    refused(cli(*words("model", MODEL, output, "--model", shipped / "other", *model[2:])))
    (data / "0.txt").write_text("A blue square.")
    refused(cli(*words("model", MODEL, output, *model)))
    lora = ("--learns", "lora", "--lora-rank")
    assert cli(*words("model", MODEL, tmp_path / "lora", *model, *lora, 4)).code == 0
    refused(cli(*words("model", MODEL, tmp_path / "lora", *model, *lora, 8)))


@pytest.mark.slow
def test_no_option_of_an_encoder_changes_on_the_way(
    cli: Cli, tmp_path: Path, shipped: Path
) -> None:
    output = tmp_path / "run"
    start = ("--start", shipped / "model", "--data", "scenes:6")
    assert cli(*words("encoder", ENCODER, output, *start)).code == 0
    for change in OTHER_ENCODER.values():
        refused(cli(*other("encoder", ENCODER, output, change), *start))
    refused(cli(*words("encoder", ENCODER, output, "--data", "scenes:7", *start[:2])))
    refused(cli(*words("encoder", ENCODER, output, "--variant", "fastvithd-small", *start[2:])))


def hasty(usual: Callable[..., None]) -> Callable[..., None]:
    """Return how a run is made that writes a checkpoint after every step."""

    def made(self: loop.Run, task: Any, schedule: Any, *rest: Any) -> None:
        usual(self, task, replace(schedule, checkpoint_seconds=0), *rest)

    return made


def test_a_cut_checkpoint_costs_the_steps_since_the_one_before(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert cli(*words("draft", DRAFT, whole)).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "__init__", hasty(loop.Run.__init__))
        assert cli(*words("draft", DRAFT, output)).code == 0
    last = output / "checkpoint.pt"
    assert torch.load(checkpoint.before(last), weights_only=True)["step"] == 1
    last.write_bytes(last.read_bytes()[:-200])
    said = cli(*words("draft", DRAFT, output))
    assert said.code == 0
    assert last.name in said.err
    expected = load_file(whole / "block" / "model.safetensors")
    found = load_file(output / "block" / "model.safetensors")
    assert all(expected[name].equal(found[name]) for name in expected)
    for file in (last, checkpoint.before(last)):
        file.write_bytes(b"cut")
    said = cli(*words("draft", DRAFT, output))
    assert said.code == 1
    assert str(last) in said.err


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_ends_a_run_in_a_sentence(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(state: Any, path: Path) -> None:
        save(state, path)
        with Path("/dev/full").open("wb", buffering=0) as disk:
            disk.write(b"x")

    output = tmp_path / "another"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        said = cli(*words("draft", DRAFT, output))
    assert said.code == 1
    [sentence] = [line for line in said.err.splitlines() if line.startswith("fastvlm: ")]
    assert "full" in sentence
    assert not list(output.rglob("*.partial"))
    assert cli(*words("draft", DRAFT, output)).code == 0


def test_two_runs_in_one_folder(cli: Cli, tmp_path: Path) -> None:
    from fastvlm.functional.files import locked

    with locked(tmp_path / "run"):
        said = cli(*words("draft", DRAFT, tmp_path / "run"))
    assert said.code == 1
    assert "Another run" in said.err
