"""Figures for people and for programs: tables that fold, and JSON."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastvlm
from fastvlm.cli.files import as_json
from fastvlm.cli.tables import FigureTable
from fastvlm.cli.terminal import PlainConsole
from tests.cli.conftest import Output

Cli = Callable[..., Output]


def printed(monkeypatch: pytest.MonkeyPatch, columns: int, table: FigureTable) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    console = PlainConsole()
    console.file = io.StringIO()
    table.print(console)
    return console.file.getvalue()


@pytest.mark.parametrize("columns", [1, 20, 40, 60, 80, 200])
def test_no_figure_is_cut(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    figures = [[f"{row}{column}.25" for column in range(6)] for row in range(4)]
    headings = ["strategy", *(f"acceptance of {column}" for column in range(6))]
    names = ("transformers", "imitation", "a name of [bold]several[/bold] words :smile:", "x" * 18)
    table = FigureTable(headings, rows=[[n, *f] for n, f in zip(names, figures, strict=True)])
    said = printed(monkeypatch, columns, table)
    assert re.findall(r"\d+\.25", said) == [one for row in figures for one in row]
    assert "…" not in said
    assert names[-1] in said
    assert "[bold]several[/bold]" in said
    assert all(len(line.rstrip()) <= max(columns, 30) for line in said.splitlines())
    # A table, where there is room for one.
    assert ("acceptance of 5" in said) == (columns < 80)


def test_the_demo_is_whole_in_forty_columns(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("40", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        said = cli("demo")
        assert said.code == 0
        assert "…" not in said.out
        lines = said.out.splitlines()
        assert max(map(len, lines)) <= int(columns)
        # Two images and their median, each with a figure of both ways.
        assert len(re.findall(r"\d+\.\dx? +|\d+\.\d, \d+\.\d$", said.out, re.MULTILINE)) >= 3
        assert said.out.count("speculative") >= 5


def test_a_pipe_has_no_edge(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    said = cli("benchmark", "--limit", 1, "--max-new-tokens", 3)
    assert said.code == 0
    assert "acceptance" in said.out
    assert "transformers 5" in said.out.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        ("demo", "--images", 1),
        ("generate", "IMAGE", "--max-new-tokens", 4),
        ("benchmark", "--limit", 1, "--max-new-tokens", 3, "--strategies", "prompt-lookup"),
        ("audit", "--limit", 1, "--max-new-tokens", 3, "--strategies", "prompt-lookup", "--output",
         "OUT"),
        ("convert", "MODEL", "OUT"),
    ],
)  # fmt: skip
def test_json_goes_to_a_file_or_alone_to_standard_output(
    cli: Cli, shipped: Path, tmp_path: Path, words: tuple[Any, ...]
) -> None:
    file = tmp_path / "figures.json"
    places = {"IMAGE": shipped / "images" / "0.png", "MODEL": shipped / "model"}

    def given(number: int) -> list[Any]:
        return [places.get(word, tmp_path / f"{number}" if word == "OUT" else word)
                for word in words]  # fmt: skip

    said = cli(*given(1), "--json", file)
    assert said.code == 0, said.err
    alone = cli(*given(2), "--json", "-")
    assert (alone.code, alone.err) == (0, "")
    assert json.loads(alone.out).keys() == json.loads(file.read_text()).keys()
    assert not list(tmp_path.glob("*.partial"))


def test_replies_as_json_are_those_of_the_stream(cli: Cli, shipped: Path, broken: Path) -> None:
    image, prompt = shipped / "images" / "0.png", "What is it?"
    words = ("generate", image, broken, "--prompt", prompt, "--max-new-tokens", 6, "--json", "-")
    said = cli(*words)
    assert said.code == 1
    assert str(broken) in said.err
    [reply, failed] = json.loads(said.out)["replies"]
    expected = fastvlm.load(shipped / "model").generate(prompt, image, max_new_tokens=6)
    assert reply["token_ids"] == expected.token_ids
    assert reply["text"] == expected.text.lstrip()
    assert failed.keys() == {"image", "error"}


def test_figures_that_are_not_finite_are_null() -> None:
    text = as_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": "caf\udce9"}})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": "caf\udce9"}}


@pytest.mark.parametrize("place", ["", ".", "none/figures.json", "file/figures.json", "/proc/x"])
def test_json_that_could_not_be_written_is_refused_first(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastvlm.vlm.load", None)  # nothing is loaded
    (tmp_path / "file").write_text("whole")
    for verb in (("demo",), ("benchmark",), ("generate", "a.png")):
        said = cli(*verb, "--json", place)
        assert said.code == (1 if place else 2)
        assert said.sentence()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


def test_json_into_a_device(cli: Cli, shipped: Path) -> None:
    image = shipped / "images" / "0.png"
    said = cli("generate", image, "--max-new-tokens", 3, "--json", os.devnull)
    assert (said.code, said.err) == (0, "")
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize(
    "words",
    [
        ("audit",),
        ("evaluate", "--tasks", "coco", "--data", "."),
        ("train", "draft", "--data", "scenes:3"),
        ("train", "model", "--data", "scenes:3", "--model", "m"),
    ],
)
def test_an_output_that_is_no_folder_is_refused_first(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("fastvlm.vlm.load", None)
    file = tmp_path / "file"
    file.write_text("whole")
    for output in (file, file / "inside", "/proc/inside"):
        said = cli(*words, "--output", output)
        assert said.code == 1
        assert said.sentence()
    assert file.read_text() == "whole"
