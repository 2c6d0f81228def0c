"""Command lines: each verb's shortest useful one, with words changed, added and left out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import typer
from hypothesis import strategies as st

import fastvlm_example
from fastvlm.cli import run
from fastvlm.cli.verbs import app
from fastvlm.functional.errors import InputError
from fastvlm_example.scenes import render, sample
from tests.fuzzing.area import WrongError
from tests.fuzzing.models import save_family, save_fastvithd

LONG = ("--steps", "--joint-steps", "--epochs", "--max-new-tokens", "--batch", "--limit",
        "--held-out", "--accumulation", "--prompts", "--repeats", "--workers")  # fmt: skip
"""Options whose value decides how long the work takes: a large one is no hang."""
VALUES = (
    "0", "1", "-1", "3", "0.5", "1e-40", "nan", "inf", "1e400", "99999999999999999999", "",
    " ", "é", "caf\udce9", "a,b", "scenes:2", "scenes:0", "scenes:x", "-", "--", "--help",
    "cuda", "cpu", "meta", "float16", "float8", "imitation", "early-exit@9", "prompt-lookup:0",
    "block", "mlp", "layer-skip", "https://example.com/a.png", "/", "/dev/null", "owner/name",
)  # fmt: skip
SLOW_VALUES = ("0", "1", "-1", "nan", "x", "1e-40", "")


@dataclass(frozen=True, slots=True)
class WordEdit:
    """A change of a command line's words.

    Args:
        kind: What is done.
        at: The word's number, modulo their count.
        word: What is put there: an option, or its value.
        value: The option's value; None for none.
    """

    kind: str
    at: int
    word: str
    value: str | None


@dataclass(frozen=True, slots=True)
class Typed:
    """A command line, `{folder}` standing for that of the models and images."""

    verb: str
    edits: tuple[WordEdit, ...]


class CommandLines:
    """See `Area`."""

    name: ClassVar[str] = "command lines"
    share: ClassVar[float] = 0.02

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_fastvithd(folder)
        save_family("llava", folder / "llava")
        listing = [
            {"file": "0.png", "kind": "scene", "title": "A scene", "credit": None,
             "licence": None, "source": None},
        ]  # fmt: skip
        images = folder / "images"
        images.mkdir()
        render(sample(1), 128).save(images / "0.png")
        (images / "images.json").write_text(json.dumps(listing))
        fastvlm_example.FOLDER = folder
        fastvlm_example.MODEL, fastvlm_example.DRAFT = folder / "model", folder / "draft"
        fastvlm_example.DRAFT_MLP, fastvlm_example.IMAGES = folder / "draft", images
        sys.modules["fastvlm.cli.demo"].MAX_NEW_TOKENS = 4  # type: ignore[attr-defined]
        self.options = sorted(set(_options()))
        self.places = tuple(
            str(folder / name) for name in ("model", "llava", "draft", "images", "none", "out")
        )

    def cases(self) -> st.SearchStrategy[Any]:
        """See `Area`."""
        option = st.sampled_from(self.options)
        value = st.sampled_from((*VALUES, *self.places)) | st.text(max_size=6)
        value = value.filter(lambda text: "\0" not in text)
        pair = st.one_of(
            st.tuples(option.filter(lambda name: name not in LONG), st.none() | value),
            st.tuples(st.sampled_from(LONG), st.sampled_from(SLOW_VALUES)),
            st.tuples(value, st.none()),
        )
        edit = st.builds(
            lambda kind, at, put: WordEdit(kind, at, *put),
            st.sampled_from(["append", "append", "insert", "replace", "drop"]),
            st.integers(0, 30),
            pair,
        )
        return st.builds(
            Typed, st.sampled_from(sorted(VERBS)), st.lists(edit, max_size=3).map(tuple)
        )

    def check(self, case: Typed) -> None:
        """See `Area`."""
        words = self.words(case)
        os.chdir(self.folder)
        os.environ["COLUMNS"] = "80"
        outputs = [self.folder / "stdout", self.folder / "stderr"]
        for stream, file in zip((1, 2), outputs, strict=True):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, stream)
        # Those of a process under pytest are its own.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = run(words)
        sys.stdout.flush()
        sys.stderr.flush()
        said, errors = (file.read_text(errors="replace") for file in outputs)
        if code not in (0, 1, 2):
            raise WrongError(f"exit code {code}: {words}")
        if "Traceback" in said + errors or "fault of its own" in errors:
            raise WrongError(f"{words}: {errors[-2000:]}")
        if code and not errors.strip():
            raise WrongError(f"exit code {code}, and not a word on standard error: {words}")
        if code:
            raise InputError(errors.strip().splitlines()[-1])

    def words(self, case: Typed) -> list[str]:
        """Return the words of a case."""
        found = [word.replace("{folder}", str(self.folder)) for word in VERBS[case.verb]]
        number = len(case.verb.split())
        for edit in case.edits:
            put = [edit.word] if edit.value is None else [edit.word, edit.value]
            free = max(1, len(found) - number)
            at = number + edit.at % free
            if edit.kind == "append":
                found += put
            elif edit.kind == "insert":
                found[at:at] = put
            elif found[at - 1] in LONG or (at < len(found) and found[at] in LONG):
                continue
            elif edit.kind == "replace":
                found[at : at + 1] = put
            else:
                del found[at : at + 1]
        return found


VERBS: dict[str, Sequence[str]] = {
    "demo": ("demo",),
    "generate": ("generate", "{folder}/images/0.png", "--max-new-tokens", "4"),
    "audit": ("audit", "--images", "{folder}/images", "--max-new-tokens", "4"),
    "evaluate": ("evaluate", "--tasks", "pope", "--data", "{folder}/none", "--output",
                 "{folder}/out", "--max-new-tokens", "2"),
    "convert": ("convert", "{folder}/model", "{folder}/converted"),
    "benchmark": ("benchmark", "--images", "{folder}/images", "--max-new-tokens", "3",
                  "--strategies", "imitation"),
    "train draft": ("train", "draft", "--data", "scenes:4", "--held-out", "1", "--steps", "1",
                    "--workers", "0", "--output", "{folder}/trained"),
    "train encoder": ("train", "encoder", "--teacher", "{folder}/none.onnx", "--data", "scenes:4",
                      "--held-out", "2", "--steps", "1", "--batch", "1", "--start",
                      "{folder}/model", "--image-size", "64", "--workers", "0", "--output",
                      "{folder}/taught"),
    "train model": ("train", "model", "--data", "scenes:4", "--steps", "1", "--batch", "1",
                    "--model", "{folder}/model", "--image-size", "128", "--workers", "0",
                    "--output", "{folder}/tuned"),
}  # fmt: skip


def _options() -> Iterator[str]:
    """Yield every option of every verb."""
    waiting: list[Any] = [typer.main.get_command(app)]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        for parameter in command.params:
            yield from (name for name in parameter.opts if name.startswith("--"))
