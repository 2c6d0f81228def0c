"""METEOR and SPICE: what is said where they can't run, and METEOR's published figures."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from fastvlm.functional.errors import InputError
from fastvlm.metrics.java import NotComputed, meteor, spice

Metric = Callable[[Mapping[str, str], Mapping[str, Sequence[str]]], float | NotComputed]

PREDICTION, REFERENCES = {"a": "a dog"}, {"a": ["a dog runs"]}

runs_java = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="pycocoevalcap and Java are optional.",
)


@pytest.mark.parametrize("metric", [meteor, spice])
def test_what_is_missing_is_said(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert str(metric(PREDICTION, REFERENCES)) == "not computed: no Java"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install 'fastvlm[java-metrics]'" in str(metric(PREDICTION, REFERENCES))


@pytest.mark.parametrize("metric", [meteor, spice])
def test_bad_input_is_named(metric: Metric) -> None:
    with pytest.raises(InputError, match="'a' has no references"):
        metric(PREDICTION, {})


@runs_java
def test_spice_does_not_download_its_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert "SPICE's parser is missing" in str(spice(PREDICTION, REFERENCES))


@runs_java
@pytest.mark.slow
def test_published_meteor_of_magic(data: Path) -> None:
    file = data / "scored_captions" / "magic_coco.json.gz"
    if not file.is_file():
        pytest.skip(f"No file {file}.")
    rows = json.loads(gzip.decompress(file.read_bytes()))
    score = meteor(
        {str(index): row["prediction"] for index, row in enumerate(rows)},
        {str(index): row["captions"] for index, row in enumerate(rows)},
    )
    assert score == pytest.approx(0.174, abs=5e-4)


@runs_java
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "published"), [("good", 0.3444), ("bad", 0.1861)])
def test_published_meteor_of_clipscore(data: Path, kind: str, published: float) -> None:
    folder = data / "metric_fixtures" / "clipscore"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    predictions = json.loads((folder / f"{kind}_captions.json").read_text(encoding="utf-8"))
    references = json.loads((folder / "refs.json").read_text(encoding="utf-8"))
    assert meteor(predictions, references) == pytest.approx(published, abs=5e-5)


@runs_java
@pytest.mark.slow
def test_published_meteor_of_nlg_eval(data: Path) -> None:
    folder = data / "metric_fixtures" / "nlg-eval" / "examples"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    tests, first, second = (
        (folder / name).read_text(encoding="utf-8").splitlines()
        for name in ("hyp.txt", "ref1.txt", "ref2.txt")
    )
    references = {str(row): list(pair) for row, pair in enumerate(zip(first, second, strict=True))}
    predictions = {str(row): text for row, text in enumerate(tests)}
    assert meteor(predictions, references) == pytest.approx(0.295797, abs=5e-7)
