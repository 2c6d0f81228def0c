"""How a command line can end: its exit code, one sentence, and never a traceback."""

from __future__ import annotations

import errno
import io
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvlm.cli import run, verbs
from fastvlm.functional.errors import StorageError
from fastvlm.training.loop import StoppedError
from tests.cli.conftest import Output

Cli = Callable[..., Output]
SOURCES = Path(__file__).parents[2] / "src"
MAIN = [sys.executable, "-c", "from fastvlm.cli import main; main()"]


@pytest.fixture
def failing(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Output]:
    """Return a function that runs a verb in which an error is raised."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def call(error: BaseException | Callable[[], None]) -> Output:
        def broken(*_: object, **__: object) -> None:
            if isinstance(error, BaseException):
                raise error
            error()

        monkeypatch.setattr("fastvlm.vlm.load", broken)
        return cli("generate", "café.png", "--prompt", "What's it?")

    return call


def test_a_failure_of_our_own_leaves_a_report(
    failing: Callable[..., Output], tmp_path: Path
) -> None:
    error = RuntimeError("a bug\nof two lines")
    error.__cause__ = KeyError("what was missing")
    said = failing(error)
    assert said.code == 1
    [report] = tmp_path.glob("fastvlm-*.txt")
    assert str(report) in said.sentence()
    text = report.read_text()
    for told in ("fastvlm generate 'café.png' --prompt", "a bug", "what was missing", "Traceback",
                 torch.__version__, platform.platform()):  # fmt: skip
        assert told in text
    assert "hf_secret" not in text
    assert report.stat().st_mode & 0o077 == 0


def test_a_report_that_can_not_be_written(
    failing: Callable[..., Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    said = failing(RuntimeError("a bug"))
    assert said.code == 1
    assert "a bug" in said.sentence()


def test_a_traceback_is_there_for_who_asks(
    failing: Callable[..., Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVLM_DEBUG", "1")
    said = failing(RuntimeError("a bug"))
    assert said.code == 1
    assert said.err.startswith("Traceback")
    assert said.err.endswith("RuntimeError: a bug\n")
    assert not list(tmp_path.glob("fastvlm-*"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageError("figures.json can't be written: the disk is full."), 1),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/shadow"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"caf\xe9"), 1),
        (OSError("what a library says\nin two lines"), 1),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 1),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), 1),
        (EOFError("Ran out of input"), 1),
        (StoppedError("Stopped after step 3 of 9.", signal.SIGTERM), 143),
        (StoppedError("Stopped after step 3 of 9.", signal.SIGINT), 130),
    ],
)
def test_an_error_is_one_sentence(
    failing: Callable[..., Output], error: Exception, code: int
) -> None:
    said = failing(error)
    assert said.code == code
    assert said.sentence()


def test_memory_that_is_out_is_no_bug(failing: Callable[..., Output], tmp_path: Path) -> None:
    assert "--batch" in failing(MemoryError()).sentence()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_clears_up_first(
    failing: Callable[..., Output], number: signal.Signals, code: int
) -> None:
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    # Under nohup it is ignored, and nothing would wake the verb.
    outer = signal.signal(number, usual)
    cleared = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleared.append(True)

    try:
        assert failing(work) == Output(code, "", "")
        assert cleared == [True]
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, outer)


def test_ctrl_c_while_verbs_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "fastvlm.cli.running":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fastvlm.cli.running", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert run(["demo"]) == 130
    assert capsys.readouterr() == ("", "")


class Streams:
    """Standard output and error of a process, in bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self.written = {name: io.BytesIO() for name in ("stdout", "stderr")}
        for name, buffer in self.written.items():
            monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding))

    def text(self, name: str) -> str:
        getattr(sys, name).flush()
        return self.written[name].getvalue().decode("ascii")


@pytest.mark.usefixtures("cli")
def test_names_and_images_in_ascii(
    monkeypatch: pytest.MonkeyPatch, shipped: Path, broken: Path
) -> None:
    folder = broken.parent
    names = ["café.png", os.fsdecode(b"caf\xe9.png"), "two\nlines.png", ":+1: [red].png"]
    for name in names:
        (folder / name).write_bytes((shipped / "images" / "0.png").read_bytes())
    streams = Streams(monkeypatch, "ascii")
    images = [str(folder / name) for name in (names[0], "sûr.png", *names[1:])]
    assert run(["generate", *images, "--max-new-tokens", "3", "--stats"]) == 1
    shown = [r"caf\xe9", r"caf\udce9", r"two\nlines", ":+1: [red]"]
    replies = streams.text("stdout").splitlines()
    for name, line in zip(shown, replies, strict=True):
        assert f"/{name}.png: " in line
    told = streams.text("stderr").splitlines()
    assert len(told) == len(images)
    assert r"s\xfbr.png" in told[1]


@pytest.mark.usefixtures("cli")
def test_the_demo_and_help_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ["benchmark", "--limit", "1", "--max-new-tokens", "3"]
    for words in (["demo", "--images", "1"], measured, ["train", "draft", "--help"]):
        streams = Streams(monkeypatch, "ascii")
        assert run(words) == 0
        assert streams.text("stdout")
        assert "\\x" not in streams.text("stdout")
        assert streams.text("stderr") == ""


@pytest.mark.usefixtures("cli")
def test_an_output_that_is_closed(monkeypatch: pytest.MonkeyPatch, shipped: Path) -> None:
    words = ["generate", str(shipped / "images" / "0.png"), "--max-new-tokens", "3"]
    for names in (("stdout",), ("stderr",), ("stdin", "stdout", "stderr")):
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(sys, name, None)
            assert run([*words, "--stats"]) == 0
            assert run([*words, "nowhere.png"]) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["demo", "--images", "1"], ["demo", "--json", "-"]]
)
def test_an_output_that_is_full(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: list[str], capsys: Any
) -> None:
    del cli
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("fastvlm: ")
    assert said.count("\n") == 1


def test_errors_that_nobody_can_be_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    del cli
    full = Path("/dev/full").open("w")  # noqa: SIM115 (what it holds back can't be flushed)
    monkeypatch.setattr(sys, "stderr", full)
    assert [run(["generate", "nowhere.png"]), run(["generate"]), run([])] == [1, 2, 2]
    with suppress(OSError):
        full.close()


@pytest.mark.parametrize("words", [["--help"], ["demo", "--images", "1"], ["demo", "--json", "-"]])
def test_a_reader_that_is_gone(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: list[str], capsys: Any
) -> None:
    del cli
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(words) == 141
    assert capsys.readouterr().err == ""


def test_a_process_with_its_streams_closed_or_in_the_c_locale(tmp_path: Path) -> None:
    environment = {
        **os.environ, "PYTHONPATH": str(SOURCES), "LC_ALL": "C", "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40",
    }  # fmt: skip
    line = " ".join(f"'{word}'" for word in MAIN)
    for closed, code in (("--help >&-", 0), ("--help 2>&- <&-", 0), ("--no-such <&- >&- 2>&-", 2)):
        done = subprocess.run(
            f"{line} {closed}", shell=True, env=environment, cwd=tmp_path, capture_output=True,
            check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (code, b"")
        assert done.stdout.isascii()


def test_quiet_is_without_warnings_and_progress(
    cli: Cli, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm.cli.terminal.PROGRESS_LINE_SECONDS", -1)
    words = ("generate", shipped / "images" / "0.png", "--max-new-tokens", 3, "--model",
             shipped / "other", "--draft", shipped / "draft")  # fmt: skip
    said = cli(*words)
    assert said.err
    assert cli(*words, "--quiet") == Output(0, said.out, "")
    measured = ("benchmark", "--limit", 1, "--max-new-tokens", 3, "--strategies", "prompt-lookup")
    assert "Measuring 1/1" in cli(*measured).err
    assert cli(*measured, "--quiet").err == ""
    assert cli("generate", "nowhere.png", "--quiet").sentence()


def test_warnings_are_as_they_were_afterwards(cli: Cli) -> None:
    filters = list(warnings.filters)
    cli("generate", "nowhere.png", "--quiet")
    assert warnings.filters == filters


def test_the_command_line_is_built_once() -> None:
    assert verbs.command() is verbs.command()
    assert re.fullmatch(r"fastvlm", verbs.command().name)
