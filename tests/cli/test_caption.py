"""`fastvlm caption`: what a folder, its failures and a stopped run come to."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm_example.scenes import render, sample
from tests.cli.conftest import Output

Cli = Callable[..., Output]
LIMIT = ("--max-new-tokens", "6")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(7):
        render(sample(number), 128).save(folder / f"{number}.png")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def rows(folder: Path) -> list[Any]:
    return [
        json.loads(line)
        for file in sorted(folder.glob("part-*.jsonl"))
        for line in file.read_text().splitlines()
    ]


def test_a_folder_of_images(cli: Cli, images: Path, tmp_path: Path) -> None:
    words = ("caption", images, tmp_path / "o", "--part-size", 3, "--prompt", "{name}?", *LIMIT)
    said = cli(*words)
    assert (said.code, said.err) == (0, "")
    assert ": 3." in said.out
    assert [row["image"] for row in rows(tmp_path / "o")] == [
        f"{number}.png" for number in range(7)
    ]
    assert rows(tmp_path / "o")[0]["prompt"] == "0.png?"
    before = content(tmp_path / "o")
    (tmp_path / "o" / "part-000001.jsonl").unlink()
    times = (tmp_path / "o" / "part-000000.jsonl").stat().st_mtime_ns
    assert cli(*words).code == 0
    assert content(tmp_path / "o") == before
    assert (tmp_path / "o" / "part-000000.jsonl").stat().st_mtime_ns == times


def test_the_images_of_another_folder_are_no_part_of_it(
    cli: Cli, images: Path, tmp_path: Path
) -> None:
    assert cli("caption", images, tmp_path / "o", *LIMIT).code == 0
    images.rename(tmp_path / "others")
    said = cli("caption", tmp_path / "others", tmp_path / "o", *LIMIT)
    assert said.code == 1
    assert "another input" in said.sentence()


def test_images_that_fail_are_listed(cli: Cli, images: Path, tmp_path: Path) -> None:
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:60])
    words = ("caption", images, tmp_path / "o", "--max-failed", 0.5, *LIMIT)
    said = cli(*words)
    assert said.code == 1
    assert "failed: 1," in said.out
    [failed] = (tmp_path / "o" / "failed.jsonl").read_text().splitlines()
    assert json.loads(failed)["image"] == "3.png"
    assert len(rows(tmp_path / "o")) == 6
    assert cli("caption", images, tmp_path / "p", *LIMIT).code == 1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--prompt", "{"), 2),
        (("--json-schema", "gone.json"), 1),
        (("--prompt", "Another."), 1),
        (("--max-new-tokens", "7"), 1),
    ],
)
def test_what_is_refused(
    cli: Cli, images: Path, tmp_path: Path, options: tuple[str, ...], code: int
) -> None:
    words = ("caption", images, tmp_path / "o", *LIMIT)
    assert cli(*words, "--prompt", "One.").code == 0
    said = cli(*words, *options)
    assert said.code == code
    assert said.sentence()


def test_without_ray(
    cli: Cli, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm.cli.caption.find_spec", lambda _: None)
    words = ("caption", images, tmp_path / "o", *LIMIT)
    for options in (("--workers", 2), ("--address", "auto")):
        said = cli(*words, *options)
        assert said.code == 1
        assert "pip install 'fastvlm[ray]'" in said.sentence()
    assert cli(*words).code == 0


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(images: Path, tmp_path: Path) -> None:
    run = "from fastvlm.cli import main; main()"

    def start(folder: str) -> subprocess.Popen[Any]:
        words = ["caption", str(images), str(tmp_path / folder), "--part-size", "1", *LIMIT]
        return subprocess.Popen([sys.executable, "-c", run, *words], stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    draws = random.Random(1)
    kills = 0
    while True:
        process = start("killed")
        parts = len(rows(tmp_path / "killed"))
        while process.poll() is None and len(rows(tmp_path / "killed")) <= parts:
            time.sleep(0.01)
        time.sleep(draws.random() * 0.2)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0
    assert kills
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
