"""Every example runs on a small model of the real classes."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.processors import sample_image, saved

EXAMPLES = Path(__file__).parents[1] / "examples"
Run = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    saved("llava", folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of captioned images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        sample_image(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("Shapes on a plain ground.")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs an example and returns what it prints."""

    def call(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        finally:
            torch.set_flush_denormal(False)
        return capsys.readouterr().out

    return call


FEW = ("--max-new-tokens", 6)


def test_describe(run: Run, model: Path, images: Path) -> None:
    said = run("describe", model, images / "0.png", images / "1.png", *FEW)
    assert said.count("tokens per pass") == 2


def test_in_transformers(run: Run, model: Path, images: Path) -> None:
    assert "identical: True" in run("in_transformers", model, images / "0.png", *FEW)


def test_caption_folder(run: Run, model: Path, images: Path) -> None:
    for file in images.glob("*.txt"):
        file.unlink()
    (images / "broken.png").write_bytes(b"no image")
    lines = run("caption_folder", model, images, *FEW).splitlines()
    assert len(lines) == 5
    assert sum('"error"' in line for line in lines) == 1


def test_dialogue(run: Run, model: Path, images: Path) -> None:
    first = run("dialogue", model, images / "0.png", "--seed", 3, *FEW)
    assert first.count("\n> ") == 2
    assert first == run("dialogue", model, images / "0.png", "--seed", 3, *FEW)


def test_train_draft(run: Run, model: Path, images: Path, tmp_path: Path) -> None:
    said = run("train_draft", model, images, tmp_path / "out", "--steps", 2, *FEW)
    assert "tokens per pass" in said


@pytest.mark.slow
def test_train_on_ray(model: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    # In a process of its own: Ray is started once in each.
    script = EXAMPLES / "train_on_ray.py"
    words = ["draft", "--model", model, "--data", images, "--output", tmp_path / "out", *FEW]
    words += ["--steps", 2, "--held-out", 1, "--device", "cpu"]
    command = [sys.executable, script, "--workers", 2, "--", *words]
    subprocess.run([str(word) for word in command], check=True, timeout=600)
    assert (tmp_path / "out" / "block" / "config.json").is_file()


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text()
    assert all(f"def test_{file.stem}(" in source for file in EXAMPLES.glob("*.py"))
