"""Every option of every verb: nonsense gets one sentence and exit code 2, and nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from fastvlm.cli.command import HelpFormatter
from fastvlm.cli.verbs import app
from tests.cli.conftest import Output

Cli = Callable[..., Output]
REQUIRED = {
    "generate": ("a.png",),
    "audit": ("--output", "o"),
    "caption": ("i", "o"),
    "evaluate": ("--tasks", "coco", "--data", "d", "--output", "o"),
    "convert": ("m", "o"),
    "export onnx": ("f",),
    "train draft": ("--data", "d", "--output", "o"),
    "train encoder": ("--teacher", "t.onnx", "--data", "d", "--output", "o"),
    "train model": ("--data", "d", "--output", "o", "--model", "m"),
}
"""What a verb needs besides the option that is looked at."""
NO_TEXTS = ("caf\udce9", "a\0b")
"""Bytes that are no UTF-8, as Python has them in `sys.argv`, and a character that no path has."""
NO_NUMBERS = (
    "many", "", " ", "nan", "inf", "-inf", "1e400", "-1", "9" * 20, "9" * 5000, "0x10", "é",
    *NO_TEXTS,
)  # fmt: skip


def verbs(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield each verb that there is, and its command."""
    inner = getattr(command, "commands", {})
    if not inner:
        yield " ".join(words), command
    for name, one in inner.items():
        yield from verbs(one, (*words, name))


VERBS = dict(verbs(typer.main.get_command(app)))


def options(*kinds: Any) -> list[Any]:
    """Return the words of every option of some types: its verb, what that needs, and its name."""
    found = []
    for verb, command in VERBS.items():
        for option in command.params:
            annotation = option.type_descriptor.annotation
            wanted = annotation in kinds or (get_args(annotation) and Any in kinds)
            if wanted and option.opts[0].startswith("--"):
                words = [*verb.split(), *REQUIRED.get(verb, ()), option.opts[0]]
                found.append(pytest.param(words, id=f"{verb} {option.opts[0]}"))
    return found


def refused(cli: Cli, words: Sequence[str], values: Sequence[str]) -> None:
    """Check that each value of an option is refused, and the option named."""
    for value in values:
        said = cli(*words, value)
        assert (said.code, value) == (2, value)
        assert words[-1] in said.sentence()


@pytest.mark.parametrize("words", options(int, float))
def test_a_number_that_is_none(cli: Cli, words: list[str]) -> None:
    refused(cli, words, NO_NUMBERS)


@pytest.mark.parametrize("words", options(Path))
def test_a_path_that_is_none(cli: Cli, words: list[str]) -> None:
    refused(cli, words, ("", "a\0b"))


@pytest.mark.parametrize("words", options(str, list[str]))
def test_a_text_that_is_none(cli: Cli, words: list[str]) -> None:
    refused(cli, words, NO_TEXTS)


@pytest.mark.parametrize("words", options(Any))
def test_a_choice_that_is_none(cli: Cli, words: list[str]) -> None:
    if get_args(option_of(words).type_descriptor.annotation)[0] is not str:
        refused(cli, words, ("", "none of them", *NO_TEXTS))


def option_of(words: Sequence[str]) -> Any:
    """Return an option by the words that end with its name."""
    verb = max((name for name in VERBS if " ".join(words).startswith(name)), key=len)
    return next(option for option in VERBS[verb].params if words[-1] in option.opts)


@pytest.mark.parametrize("verb", VERBS)
def test_a_word_too_many_or_misspelt(cli: Cli, verb: str) -> None:
    words = (*verb.split(), *REQUIRED.get(verb, ()))
    for name in ("--colour", "-x", "--devise", "--jsno"):
        said = cli(*words, name, "1")
        assert said.code == 2
        assert name.lstrip("-") in said.sentence()
    assert "--device" in cli(*words, "--devise", "cpu").sentence()
    if verb != "generate":
        assert cli(*words, "one too many").code == 2


@pytest.mark.parametrize("words", [(), ("train",), ("export",)])
def test_a_verb_alone_says_what_there_is(cli: Cli, words: tuple[str, ...]) -> None:
    said = cli(*words)
    assert (said.code, said.out) == (2, "")
    assert said.err == cli(*words, "--help").out
    assert "Usage: fastvlm" in said.err


@pytest.mark.parametrize("columns", [30, 40, 80, 200])
def test_help_is_whole_at_any_width(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for verb, command in VERBS.items():
        said = cli(*verb.split(), "--help")
        assert said.code == 0
        assert said.out.isascii()
        # Nothing is cut: every option is there, and every word of what it does.
        told = " ".join(said.out.split())
        for option in command.params:
            assert (option.metavar if option.opts[0][0] != "-" else option.opts[0]) in told
            assert " ".join((option.help or "").split()) in told
        long = {word for word in said.out.split() if len(word) + 8 > columns}
        for line in said.out.splitlines()[1:]:
            assert len(line) <= columns or long & set(line.split())


def test_what_completes_a_command_line() -> None:
    names = {"COMP_CWORD": "3", "_FASTVLM_COMPLETE": "complete_bash"}
    completed = {
        ("fastvlm generate --dtype", "f"): ["float64", "float32", "float16"],
        ("fastvlm generate --strategy", "la"): ["layer-skip"],
        ("fastvlm generate a.png", "--sto"): ["--stop"],
    }
    for (words, begun), expected in completed.items():
        line = {"COMP_WORDS": f"{words} {begun}", **names}
        done = CliRunner().invoke(app, [], env=line, prog_name="fastvlm")
        assert done.output.split() == expected
    assert not os.environ.get("_FASTVLM_COMPLETE")


def test_a_long_name_of_help_stands_on_a_line_of_its_own() -> None:
    formatter = HelpFormatter(width=80)
    formatter.write_dl([("--a", "One."), (f"--{'b' * 40}", "Two.")])
    assert formatter.getvalue().splitlines() == [
        f"--a{' ' * 29}One.",
        f"--{'b' * 40}",
        f"{' ' * 32}Two.",
    ]
