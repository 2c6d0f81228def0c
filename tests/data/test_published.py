"""Real data sets, from files that aren't part of the project."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest

from fastvlm.data.annotations import load_json
from fastvlm.data.conversations import Conversation, Records
from fastvlm.data.feed import Feed
from fastvlm.data.reading import read_conversations


@pytest.fixture
def data() -> Path:
    named = os.environ.get("FASTVLM_DATA")
    folder = Path(named) if named else Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"No data at {folder}; FASTVLM_DATA names the folder of published data sets.")
    return folder


def read(source: Path) -> Records:
    if not source.exists():
        pytest.skip(f"No data at {source}.")
    records = read_conversations(source)
    assert isinstance(records, Records)
    return records


def test_cocos_captions_are_all_sound(data: Path) -> None:
    records = read(data / "coco_val2017_subset")
    assert len(records) == 380
    sound = [record for record in records if isinstance(record, Conversation)]
    assert len(sound) == 380
    images = {record.messages[0]["content"][0]["image"] for record in sound}
    assert len(images) == 76
    rows = load_json(data / "coco_val2017_subset" / "captions.json")["images"]
    sizes = {(row["width"], row["height"]) for row in rows}
    feed = Feed(records)
    for conversation in islice(feed, 20):
        assert conversation.messages[0]["content"][0]["image"].size in sizes
    assert feed.broken.count == 0


def test_vqas_answers_are_as_frequent_as_the_annotators_own_choice(data: Path) -> None:
    folder = data / "vqav2_subset"
    records = read(folder / "with_images_questions.json")
    rows = load_json(folder / "with_images_annotations.json")["annotations"]
    annotated = {f"question {row['question_id']}": row for row in rows}
    same = 0
    for record in records:
        assert isinstance(record, Conversation)
        row = annotated[record.name]
        answers = [answer["answer"] for answer in row["answers"]]
        answer = record.messages[-1]["content"][0]["text"]
        assert answers.count(answer) == max(map(answers.count, answers))
        same += answer == row["multiple_choice_answer"]
    assert len(records) == 102
    assert same >= 95  # of answers that are equally frequent they chose at will


def test_flickr8ks_captions_are_those_of_its_images(data: Path) -> None:
    records = read(data / "flickr8k")
    assert len(records) == 30_000
    assert all(isinstance(record, Conversation) for record in islice(records, 500))
