"""`fastvlm evaluate` on a benchmark in its published layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_example.scenes import render, sample
from tests.cli.conftest import Output

Cli = Callable[..., Output]
IMAGES = 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder of data sets: Flickr8k's layout in `flickr8k`, MM-Vet's in `mmvet`."""
    folder = tmp_path / "data" / "flickr8k"
    (folder / "images").mkdir(parents=True)
    names = [f"{seed}.png" for seed in range(IMAGES)]
    for seed, name in enumerate(names):
        render(sample(seed), 128).save(folder / "images" / name)
    (folder / "dev.txt").write_text("\n".join(names))
    (folder / "captions.tsv").write_text("".join(f"{n}\ta red square\n" for n in names))
    mmvet = tmp_path / "data" / "mmvet"
    shutil.copytree(folder / "images", mmvet / "images")
    asked = {
        f"v1_{n}": {
            "imagename": names[n], "question": "What is it?", "answer": "red", "capability": ["rec"]
        }
        for n in range(2)
    }  # fmt: skip
    (mmvet / "mm-vet.json").write_text(json.dumps(asked))
    return tmp_path / "data"


def test_a_stopped_run_gives_the_same_report(cli: Cli, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "evaluate", "--tasks", "flickr8k:dev,mmvet", "--data", data, "--output", out, "--limit", 2,
        "--max-new-tokens", 8,
        "--strategies", "imitation,imitation-mlp:3,early-exit@2,prompt-lookup",
        "--prompt", "flickr8k:dev=Describe the picture.",
    )  # fmt: skip
    said = cli(*words)
    assert said.code == 0
    assert "All 16 replies have the same tokens as those of autoregressive." in said.out
    assert "not judged" in said.out
    report = json.loads((out / "report.json").read_text())
    assert json.loads(cli(*words, "--json", "-").out)["results"] == report["results"]
    assert [r["strategy"] for r in report["results"][:5]] == [
        "autoregressive", "imitation", "imitation-mlp:3", "early-exit@2", "prompt-lookup",
    ]  # fmt: skip
    assert report["plan"]["strategies"]["imitation-mlp:3"]["network"]["kind"] == "mlp"
    scores = [r["scores"] for r in report["results"]]
    assert scores[1:5] == scores[:1] * 4
    assert (out / "report.html").is_file()
    answers = out / "answers.jsonl"
    first = [json.loads(line) for line in answers.read_text().splitlines()[2:]]
    assert {line["item"] for line in first} == {"0.png", "2.png", "v1_0", "v1_1"}

    whole = answers.read_bytes()
    answers.write_bytes(whole[: len(whole) * 2 // 3])
    assert cli(*words).out == said.out
    again = json.loads((out / "report.json").read_text())
    assert [r["scores"] for r in again["results"]] == scores
    assert len(again["sessions"]) == 2

    # Grades of the replies that were written for the publisher's evaluator.
    replies = json.loads((out / "submissions" / "mmvet.json").read_text())
    grades = tmp_path / "grades.json"
    grades.write_text(json.dumps({key: {"score": [0.5]} for key in replies}))
    size = answers.stat().st_size
    said = cli(*words, "--grades", f"mmvet={grades}")
    assert "50.00" in said.out
    assert answers.stat().st_size == size
    other = cli(*words[:-1], "flickr8k:dev=What is it?")
    assert "belongs to another evaluation (other tasks)" in other.sentence()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "flickr9k"], "flickr9k"),
        (["--tasks", "coco"], "There is no folder"),
        (["--tasks", "mmvet:dev"], "mmvet has one split only"),
        (["--tasks", "mmvet", "--judge", "http://x"], "both --judge and --judge-model"),
        (["--tasks", "mmvet", "--image-sizes", "big"], "--image-sizes"),
        (["--tasks", "mmvet", "--prompt", "What?"], "--prompt"),
        (["--tasks", "mmvet", "--prompt", "coco=What?"], "--prompt names 'coco'"),
        (["--tasks", "mmvet", "--grades", "coco=x"], "--grades names 'coco'"),
        (["--tasks", "mmvet", "--grades", "mmvet=x"], "There is no file of grades at x"),
        (["--tasks", "mmvet", "--strategies", "prompt-lookup@3"], "Only early-exit takes an exit"),
        (["--tasks", "mmvet", "--strategies", "early-exit@9"], "between 1 and 4"),
        (["--tasks", "mmvet", "--strategies", "early-exit@0"], "The strategies here are"),
        (["--tasks", "mmvet", "--strategies", "early-exit", "--skipped-layers", "1"], "is for"),
    ],
)
def test_what_is_typed_wrong(
    cli: Cli, data: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    found = cli(
        "evaluate", "--data", data, "--output", tmp_path / "out", "--limit", 1,
        "--max-new-tokens", 2, *words,
    )  # fmt: skip
    # What is missing on the disk is no fault of the command line.
    missing = {"coco", "mmvet=x"} & set(words)
    assert found.code == (1 if missing else 2)
    assert said in found.sentence()
