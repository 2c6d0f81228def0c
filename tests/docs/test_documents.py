"""Every block of code in README and docs runs, and every command line in them is one."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import fastvlm
from fastvlm.cli.verbs import command
from fastvlm.prompts import question

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def blocks(language: str) -> dict[str, list[str]]:
    """Return the blocks of a language by document, of those that have any."""
    found = {
        file.name: [code for kind, code in BLOCK.findall(file.read_text()) if kind == language]
        for file in DOCUMENTS
    }
    return {name: codes for name, codes in found.items() if codes}


@pytest.fixture
def place(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which a reader's model, draft and images are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name in ("model", "draft"):
        shutil.copytree(shipped / name, tmp_path / "path" / "to" / name)
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        shutil.copy(shipped / "images" / "1.png", tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("document", blocks("python"))
def test_the_code_of_a_document_runs(document: str, place: Path) -> None:
    vlm = fastvlm.load(place / "path" / "to" / "model")
    # What a reader of the lines for transformers has already.
    names: dict[str, Any] = {"fastvlm": fastvlm, "model": vlm.model}
    names["inputs"] = vlm.prompts.inputs(question("What is it?", place / "photo.jpg"))
    for code in blocks("python")[document]:
        if "StructuredOutput" in code and find_spec("llguidance") is None:
            continue
        exec(compile(code, document, "exec"), names)


@pytest.mark.parametrize("document", blocks("sh"))
def test_the_command_lines_of_a_document_are_understood(document: str) -> None:
    text = "\n".join(blocks("sh")[document]).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] != "fastvlm":
            continue
        verb: Any = command()
        while (inner := getattr(verb, "commands", None)) and words[1:]:
            verb = inner[words.pop(1)]
        # An option that is unknown, or a value that is none, ends here.
        verb.make_context("fastvlm", words[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        assert (document.parent / target).exists(), target
