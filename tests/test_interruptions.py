"""Verbs interrupted at random moments: what goes on afterwards ends as without them.

`FASTVLM_INTERRUPTIONS` is how many interruptions are made (40, if it is not set), spread over the
verbs and over SIGTERM, SIGKILL and a full disk. Each process is forked of this one, which has
imported everything, so that a run takes a second or two.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvlm.cli import run
from fastvlm.training import loop
from fastvlm_example.scenes import render, sample
from tests.fuzzing.models import save_fastvithd
from tests.training import teachers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and mounts a small disk"),
]

NUMBER = int(os.environ.get("FASTVLM_INTERRUPTIONS", "40"))
KINDS = ("SIGTERM", "SIGKILL", "full disk")
MAX_SECONDS = 120
TIMINGS = {"seconds", "ttft_ms", "tpot_ms", "session", "proposed", "accepted", "cycles",
           "acceptance_length"}  # fmt: skip
"""What is measured, and how long drafts are, which follows from what is measured."""


@dataclass(frozen=True)
class Verb:
    """A verb that is interrupted.

    Args:
        words: Its command line, but for the output.
        output: How the output is given: an option, or "" for an argument.
        result: What of the output must be the same.
    """

    words: tuple[str, ...]
    output: str
    result: Callable[[Path], Any]

    def command(self, output: Path) -> list[str]:
        """Return the whole command line."""
        given = [self.output, str(output)] if self.output else [str(output)]
        return [*self.words, *given]


def contents(folder: Path, *patterns: str) -> dict[str, str]:
    """Return the hashes of files by their names."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for pattern in patterns
        for file in sorted(folder.glob(pattern))
        if file.is_file()
    }


def untimed(value: Any) -> Any:
    """Return JSON without what is measured."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key not in TIMINGS}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def lines(file: Path) -> list[Any]:
    """Return a journal's entries without what is measured."""
    entries = [untimed(json.loads(line)) for line in file.read_text().splitlines()]
    return sorted((json.dumps(entry) for entry in entries if entry), key=str)


@pytest.fixture(scope="module")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verb]:
    """Return the verbs by name, with a small model and data of their own."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("interrupted")
    model = save_fastvithd(folder)
    data, photos = folder / "data" / "pope", folder / "photos"
    for place in (data / "coco", data / "val2014", photos):
        place.mkdir(parents=True)
    rows = []
    for number in range(4):
        image = render(sample(number), 128)
        image.save(data / "val2014" / f"{number}.png")
        image.save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("A red square.")
        rows.append({"question_id": number, "image": f"{number}.png", "text": "A dog?",
                     "label": "yes" if number % 2 else "no"})  # fmt: skip
    for sampling in ("random", "popular", "adversarial"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / "coco" / f"coco_pope_{sampling}.json").write_text(text)
    of = ("--model", str(model))
    return {
        "convert": Verb(
            ("convert", str(model), "--dtype", "float32"), "", lambda out: contents(out, "**/*")
        ),
        "train draft": Verb(
            ("train", "draft", *of, "--data", "scenes:6", "--held-out", "1",
            "--steps", "40", "--workers", "0",
             "--exit-layer", "1"),
            "--output",
            lambda out: contents(out, "block/model.safetensors", "block/config.json"),
        ),
        "train encoder": Verb(
            ("train", "encoder", "--teacher", f"{teachers.FILE}:grid", "--start", str(model),
             "--data", "scenes:6", "--held-out", "2", "--steps", "12", "--batch", "2",
             "--image-size", "64", "--workers", "0"),
            "--output",
            lambda out: contents(out, "*.safetensors", "*.json"),
        ),
        "train model": Verb(
            ("train", "model", *of, "--data", str(photos),
            "--steps", "12", "--workers", "0", "--batch", "2",
             "--image-size", "128"),
            "--output",
            lambda out: contents(out, "*.safetensors", "*.json"),
        ),
        "evaluate": Verb(
            ("evaluate", *of, "--tasks", "pope", "--data", str(data.parent), "--max-new-tokens",
             "6", "--skipped-layers", "2", "--draft", str(folder / "draft")),
            "--output",
            lambda out: lines(out / "answers.jsonl"),
        ),
        "audit": Verb(
            ("audit", *of, "--images", str(photos), "--batch", "1", "--max-new-tokens", "8",
             "--draft", str(folder / "draft")),
            "--output",
            lambda out: [untimed(json.loads((out / "audit.json").read_text())["strategies"]),
                         lines(out / "audit.jsonl")],
        ),
    }  # fmt: skip


def forked(words: list[str], log: Path, most: int | None = None) -> int:
    """Start a command line in a process of its own; return its number.

    Args:
        words: The command line.
        log: Where its standard error goes.
        most: Bytes to which a file may grow; None for any number.
    """
    child = os.fork()
    if child:
        return child
    for stream, place in ((0, os.devnull), (1, os.devnull), (2, log)):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
    if most is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    # A checkpoint after nearly every step, so that a run is interrupted between two of them.
    started = loop.Run.__init__

    def hasty(self: loop.Run, task: Any, plan: Any, *rest: Any) -> None:
        started(self, task, replace(plan, checkpoint_seconds=0.05), *rest)

    loop.Run.__init__ = hasty  # type: ignore[method-assign]
    try:
        code = run(words)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code)


def ended(child: int) -> int:
    """Return the exit code of a process, or minus its signal."""
    until = time.monotonic() + MAX_SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("it hangs")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path | None]]:
    """Return what makes a disk of so many bytes, or makes it larger; None where that can't be."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted: list[bool] = []

    def make(size: int) -> Path | None:
        how = f"size={size}" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            mounted.append(True)
        return place if mounted else None

    yield make
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_an_interruption_costs_nothing_but_time(
    verbs: dict[str, Verb], tmp_path: Path, small_disk: Callable[[int], Path | None]
) -> None:
    drawn = random.Random(16)
    expected, seconds, needed = {}, {}, {}
    log = tmp_path / "log"
    for name, verb in verbs.items():
        output = tmp_path / "reference" / name
        output.parent.mkdir(exist_ok=True)
        started = time.monotonic()
        assert ended(forked(verb.command(output), log)) == 0, log.read_text()
        seconds[name] = time.monotonic() - started
        expected[name] = verb.result(output)
        needed[name] = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    met: Counter[str] = Counter()
    for number in range(NUMBER):
        name, kind = list(verbs)[number % len(verbs)], KINDS[number // len(verbs) % len(KINDS)]
        verb = verbs[name]
        disk = small_disk(max(4096, int(needed[name] * drawn.uniform(0.02, 0.95))))
        output = (disk if kind == "full disk" and disk else tmp_path) / "output"
        shutil.rmtree(output, ignore_errors=True)
        if kind == "full disk":
            most = None if disk else int(needed[name] * drawn.uniform(0.02, 0.5))
            code = ended(forked(verb.command(output), log, most))
        else:
            child = forked(verb.command(output), log)
            time.sleep(drawn.uniform(0, seconds[name]))
            os.kill(child, getattr(signal, kind))
            code = ended(child)
        said = log.read_text()
        assert "Traceback" not in said, f"{name}, {kind}: {said}"
        assert code in (0, 1, 143, -signal.SIGTERM, -signal.SIGKILL), f"{name}, {kind}: {said}"
        met[f"{name}, {kind}: {code}"] += 1
        if code == 1:
            sentences = [one for one in said.splitlines() if one.startswith("fastvlm: ")]
            assert sentences, said
            assert sentences[-1].endswith((".", "?")), said
        if kind == "full disk" and disk:
            small_disk(2**30)
        if not (code == 0 and name == "convert"):
            code = ended(forked(verb.command(output), log))
            said = log.read_text()
            assert code == 0, f"{name}, {kind}, again: {said}"
        assert verb.result(output) == expected[name], f"{name}, {kind}"
        left = [file.name for file in output.rglob("*.partial")]
        assert not left, f"{name}, {kind}: {left}"
        shutil.rmtree(output, ignore_errors=True)
    print(json.dumps(dict(sorted(met.items())), indent=1))  # noqa: T201
