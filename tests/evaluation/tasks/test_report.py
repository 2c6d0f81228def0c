"""The report says what the journal holds, and needs no other file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastvlm.data.tasks import Item
from fastvlm.data.tasks.captioning import Captioning
from fastvlm.data.tasks.mmvet import MmVet
from fastvlm.data.tasks.visdial import VisDial
from fastvlm.decoding import Strategy
from fastvlm.evaluation.tasks.answers import Journal
from fastvlm.evaluation.tasks.curves import Chart, Curve
from fastvlm.evaluation.tasks.plan import Plan
from fastvlm.evaluation.tasks.plots import drawn
from fastvlm.evaluation.tasks.report import write_report
from fastvlm.evaluation.tasks.runner import evaluate
from fastvlm.evaluation.tasks.scores import rows
from fastvlm.vlm import VisionLanguageModel
from tests.evaluation.tasks.conftest import NAMES

QUESTION = "Which is <b>larger</b> | red & blue?"


class Addresses(HTMLParser):
    """Collects what a page asks for, and checks that its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def mmvet(images: list[Path]) -> MmVet:
    items = tuple(Item(f"v1_{n}", QUESTION, path) for n, path in enumerate(images[:2]))
    return MmVet(items, {"v1_0": "red", "v1_1": "blue"}, {"v1_0": ["ocr"], "v1_1": ["math"]})


def test_a_report_of_three_kinds_of_task(
    vlm: VisionLanguageModel,
    strategies: dict[str, Strategy],
    planned: Callable[..., Plan],
    captions: Captioning,
    dialogue: VisDial,
    mmvet: MmVet,
    tmp_path: Path,
) -> None:
    plan = planned({"flickr8k": captions, "visdial": dialogue, "mmvet": mmvet}, (128, 192))
    journal = Journal(tmp_path / "answers.jsonl", plan)
    evaluate(vlm, strategies, plan, journal)
    found = rows(plan, journal, {})
    write_report(tmp_path, plan, journal, found)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["plan"] == plan.to_json()
    [session] = report["sessions"]
    assert {"date", "fastvlm", "commit", "hardware"} <= session.keys()
    results = {(r["task"], r["size"], r["strategy"]): r for r in report["results"]}
    assert len(results) == 2 * (3 + 1 + 3)
    scores = captions.score(
        {i.id: journal.answers["flickr8k", i.id, 192, NAMES[2]].text for i in captions.items}
    )
    assert results["flickr8k", 192, NAMES[2]]["scores"] == scores
    assert results["mmvet", 128, NAMES[0]]["scores"] is None
    ranks = dialogue.score(
        {i.id: journal.ratings["visdial", i.id, 128].ratings for i in dialogue.items}
    )
    assert results["visdial", 128, NAMES[0]]["scores"] == ranks

    text = (tmp_path / "report.md").read_text()
    assert f"{scores['CIDEr']:.4f}" in text
    assert f"{ranks['MRR']:.4f}" in text
    assert "not judged" in text
    assert "All 20 replies have the same tokens as those of autoregressive." in text
    assert session["date"] in text
    for name in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (tmp_path / name).read_text().startswith("<?xml")
    for row in (line for line in text.splitlines() if line.startswith("| ")):
        heading = row.count("|") - row.count("\\|")
        assert heading >= 3
    page = (tmp_path / "report.html").read_text()
    assert all(address.startswith("data:image/") for address in Addresses(page).found)
    assert "Which is &lt;b&gt;larger&lt;/b&gt; | red &amp; blue?" in page
    assert "<b>" not in page
    for answer in journal.answers.values():
        if answer.size == 128 and answer.item in ("0", "1") and answer.text:
            assert escape(answer.text) in page

    before = {file.name: file.read_bytes() for file in tmp_path.glob("report.*")}
    again = Journal(tmp_path / "answers.jsonl", plan)
    write_report(tmp_path, plan, again, rows(plan, again, {}))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("report.*")} == before


def test_replies_that_differ_are_told(
    vlm: VisionLanguageModel,
    strategies: dict[str, Strategy],
    planned: Callable[..., Plan],
    captions: Captioning,
    tmp_path: Path,
) -> None:
    plan = planned({"flickr8k": captions})
    journal = Journal(tmp_path / "answers.jsonl", plan)
    evaluate(vlm, strategies, plan, journal)
    key = ("flickr8k", "0", None, NAMES[2])
    journal.answers[key] = replace(journal.answers[key], tokens=(1, 2), text="something else")
    write_report(tmp_path, plan, journal, rows(plan, journal, {}))
    text = (tmp_path / "report.md").read_text()
    assert "1 of 6 replies have other tokens than those of autoregressive" in text
    assert f"- {NAMES[2]}: something else" in text


def test_a_chart_is_the_same_for_the_same_data() -> None:
    curves = [Curve("a", [4, 8], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5]), Curve("b", [4], [1.2])]
    chart = Chart("c", "C", "tokens", "speedup", curves, "", doubling=True)
    first = drawn(chart, ["a", "b"])
    assert first == drawn(chart, ["a", "b"])
    assert first.count("<svg") == 1
