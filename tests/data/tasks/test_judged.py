"""MM-Vet and LLaVA-Bench: what is asked, and the published scores from published grades."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvlm.data.tasks import llava_wild, mmvet
from fastvlm.data.tasks.llava_wild import read_reviews
from fastvlm.data.tasks.mmvet import read_grades
from fastvlm.functional.errors import InputError
from tests.data.tasks.published import write_images, write_json, write_lines


def test_mmvet(tmp_path: Path) -> None:
    question = {
        "imagename": "v1_0.png",
        "question": "What is x?",
        "answer": "-1<AND>-5",
        "capability": ["ocr", "math"],
    }
    write_json(tmp_path / "mm-vet.json", {"v1_0": question})
    write_images(tmp_path / "images", ["v1_0.png"])
    task = mmvet(tmp_path)
    [item] = task.items
    assert (item.id, item.prompt) == ("v1_0", "What is x?")
    assert item.image == tmp_path / "images" / "v1_0.png"
    assert task.answers == {"v1_0": "-1<AND>-5"}
    assert task.score({"v1_0": [0.5, 0.7]}) == pytest.approx({"ocr": 60, "math": 60, "total": 60})
    with pytest.raises(InputError, match="'v1_0' has no reply"):
        task.score({})


def test_llava_wild(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "questions.jsonl",
        [{"image": "001.jpg", "text": "Where?", "category": "conv", "question_id": 0}],
    )
    write_lines(tmp_path / "context.jsonl", [{"image": "001.jpg", "caption": "Diamond Head."}])
    write_lines(tmp_path / "answers_gpt4.jsonl", [{"question_id": 0, "text": "In Hawaii."}])
    write_images(tmp_path / "images", ["001.jpg"])
    task = llava_wild(tmp_path)
    assert [(item.id, item.prompt) for item in task.items] == [("0", "Where?")]
    assert (task.contexts, task.references) == ({"0": "Diamond Head."}, {"0": "In Hawaii."})
    assert task.score({"0": (8.0, 6.0)}) == pytest.approx({"conv": 75, "all": 75})
    write_lines(tmp_path / "answers_gpt4.jsonl", [])
    with pytest.raises(InputError, match=r"Question 0 of .* has no context or no reference"):
        llava_wild(tmp_path)


def test_published_mmvet(data: Path, tmp_path: Path) -> None:
    folder = data / "mmvet"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    (tmp_path / "mm-vet.json").symlink_to(folder / "mm-vet.json")
    asked = json.loads((folder / "mm-vet.json").read_text(encoding="utf-8"))
    write_images(tmp_path / "images", {line["imagename"] for line in asked.values()})
    task = mmvet(tmp_path)
    by_llava = (folder / "llava15" / "llava-mm-vet.jsonl").read_text(encoding="utf-8").splitlines()
    assert [item.prompt for item in task.items] == [json.loads(line)["text"] for line in by_llava]
    grades = folder / "llava15" / "results" / "llava-v1.5-7b_gpt-4-grade-3runs.json"
    scores = task.score(read_grades(grades))
    assert {name: round(score, 1) for name, score in scores.items()} == {
        "rec": 36.8,
        "ocr": 21.1,
        "know": 17.3,
        "gen": 19.9,
        "spat": 24.9,
        "math": 7.7,
        "total": 31.1,
    }


def test_published_llava_wild(data: Path) -> None:
    folder = data / "llava_bench_wild"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    task = llava_wild(folder)
    assert len(task.items) == 60
    assert len({item.image for item in task.items}) == 24
    answers = folder / "llava15" / "answers" / "llava-v1.5-7b.jsonl"
    asked = [json.loads(line)["prompt"] for line in answers.read_text("utf-8").splitlines()]
    assert [item.prompt for item in task.items] == asked
    first, second, third = (
        task.score(read_reviews(folder / "llava15" / "reviews" / f"llava-v1.5-7b-eval{run}.jsonl"))
        for run in (1, 2, 3)
    )
    assert [round(scores["all"], 1) for scores in (first, second, third)] == [64.8, 65.3, 66.3]
    assert {name: round(score, 1) for name, score in first.items()} == {
        "conv": 59.3,
        "detail": 47.7,
        "complex": 77.6,
        "all": 64.8,
    }
