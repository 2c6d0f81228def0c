"""Visual Dialog: what each round asks and offers, and the official scores of a ranking."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from fastvlm.data.tasks import visdial
from fastvlm.functional.errors import InputError
from tests.data.tasks.published import write_images, write_json

PLACE = "VisualDialog_val2018"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rounds = [
        {"question": 0, "answer": 2, "answer_options": [0, 1, 2], "gt_index": 2},
        {"question": 1, "answer": 0, "answer_options": [1, 0, 2], "gt_index": 1},
    ]
    content = {
        "questions": ["is it red", "is it big"],
        "answers": ["no", "yes", "a bit"],
        "dialogs": [{"image_id": 77, "caption": "a red bus ", "dialog": rounds}],
    }
    write_json(tmp_path / "visdial_1.0_val.json", {"data": content})
    relevance = [{"image_id": 77, "round_id": 2, "gt_relevance": [0.0, 1.0, 0.0]}]
    write_json(tmp_path / "visdial_1.0_val_dense_annotations.json", relevance)
    write_images(tmp_path / PLACE, [f"{PLACE}_000000000077.jpg"])
    return tmp_path


def test_a_round_asks_with_what_was_said_before_it(folder: Path) -> None:
    first, second = visdial(folder).items
    assert (first.id, first.options) == ("77/1", ("no", "yes", "a bit"))
    assert first.image == folder / PLACE / f"{PLACE}_000000000077.jpg"
    assert first.prompt.splitlines() == [
        "a red bus.",
        "Question: is it red?",
        "Answer the question using a single word or phrase.",
    ]
    assert (second.id, second.options) == ("77/2", ("yes", "no", "a bit"))
    assert second.prompt.splitlines()[1:3] == [
        "Question: is it red? Answer: a bit.",
        "Question: is it big?",
    ]


def test_options_are_ranked_by_their_likelihoods(folder: Path) -> None:
    task = visdial(folder)
    scores = task.score({"77/1": [-1.0, -2.0, -3.0], "77/2": [-4.0, -1.0, -9.0]})
    assert scores == pytest.approx(
        {"R@1": 1 / 2, "R@5": 1, "R@10": 1, "MRR": (1 / 3 + 1) / 2, "mean rank": 2, "NDCG": 1}
    )
    with pytest.raises(InputError, match="'77/2' has 3 options, but 1 log-likelihoods"):
        task.score({"77/1": [-1.0, -2.0, -3.0], "77/2": [-4.0]})


def test_official_scores(data: Path, tmp_path: Path) -> None:
    folder = data / "visdial" / "vispro"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    packed = gzip.decompress((folder / "visdial_1.0_val_vispro.json.gz").read_bytes())
    (tmp_path / "visdial_1.0_val.json").write_bytes(packed)
    (tmp_path / "visdial_1.0_val_dense_annotations.json").symlink_to(
        folder / "visdial_1.0_val_dense_annotations_vispro.json"
    )
    dialogues = json.loads(packed)["data"]["dialogs"]
    write_images(tmp_path / PLACE, [f"{PLACE}_{d['image_id']:012}.jpg" for d in dialogues])
    task = visdial(tmp_path)
    assert len(task.items) == 760
    assert {len(item.options) for item in task.items} == {100}
    given = Counter(turn["answer"] for dialogue in dialogues for turn in dialogue["dialog"])
    # By frequency, then by the answer's number.
    scores = task.score(
        {
            f"{dialogue['image_id']}/{number}": [
                given[key] - key * 1e-6 for key in turn["answer_options"]
            ]
            for dialogue in dialogues
            for number, turn in enumerate(dialogue["dialog"], 1)
        }
    )
    assert scores == pytest.approx(
        {
            "R@1": 0.180263,
            "R@5": 0.365789,
            "R@10": 0.4,
            "MRR": 0.301707,
            "mean rank": 12.793421,
            "NDCG": 0.284783,
        },
        abs=5e-7,
    )
