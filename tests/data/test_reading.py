"""Every layout is recognised by what is there, and read as its publisher meant it."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm.data.conversations import Broken, Conversation, Records
from fastvlm.data.reading import read_conversations
from fastvlm.functional.errors import InputError


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def draw(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(file)


def shown(source: str | Path, **options: Any) -> list[tuple[str, str, str]]:
    """Return each record's image, prompt and reply; of a broken one its name and reason."""
    records = read_conversations(source, **options)
    assert isinstance(records, Records)
    assert list(records) == [records[index] for index in range(len(records))]
    found = []
    for record in records:
        if isinstance(record, Broken):
            found.append(("broken", record.name, record.reason))
        else:
            user, assistant = record.messages
            image, prompt = user["content"]
            [reply] = assistant["content"]
            found.append((Path(image["image"]).name, prompt["text"], reply["text"]))
    return found


CAPTION = "Provide a one-sentence caption for the provided image."
SHORT_ANSWER = "Answer the question using a single word or phrase."
NOTHING = "none of messages, conversations, prompt, question, caption, text, captions in it"


def test_llavas_file(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "coco" / "train2017" / "a.jpg")
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A bus."},
    ]
    rows: list[Any] = [
        {"id": "7", "image": "coco/train2017/a.jpg", "conversations": turns},
        {"id": "8", "image": "coco/train2017/b.jpg", "conversations": turns},
        {"conversations": turns[:1]},
        "no object",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]
    file = write(tmp_path / "llava.json", rows)
    records = read_conversations(file, images=tmp_path / "elsewhere")
    assert isinstance(records, Records)
    first, *broken, text = records
    assert isinstance(first, Conversation)
    assert first.messages[0]["content"][0]["image"].name == "a.jpg"
    name = "record of llava.json"
    assert broken == [
        Broken(f"{name} 8", "missing image: coco/train2017/b.jpg"),
        Broken(f"{name} at 2", "no reply: there is no user's turn with an assistant's after it"),
        Broken(f"{name} at 3", broken[2].reason),
    ]
    assert isinstance(text, Conversation)
    assert [message["role"] for message in text.messages] == ["user", "assistant"]
    # Without the folder they are looked for around the file.
    assert isinstance(read_conversations(file)[0], Broken)
    shutil.move(tmp_path / "elsewhere", tmp_path / "images")
    assert isinstance(read_conversations(file)[0], Conversation)
    lines = tmp_path / "llava.jsonl"
    lines.write_text("\n".join(['{"half": ', *map(json.dumps, rows[:2])]))
    assert [type(record) for record in read_conversations(lines)] == [Broken, Conversation, Broken]


def test_cocos_captions(tmp_path: Path) -> None:
    draw(tmp_path / "train2017" / "000000000009.jpg")
    file = write(
        tmp_path / "annotations" / "captions_train2017.json",
        {
            "info": {},
            "licenses": [],
            "images": [
                {"id": 9, "file_name": "000000000009.jpg", "license": 1},
                {"id": 25, "file_name": "000000000025.jpg", "license": 1},
            ],
            "annotations": [
                {"id": 1, "image_id": 9, "caption": "A dish."},
                {"id": 2, "image_id": 25, "caption": "A giraffe."},
                {"id": 3, "image_id": 9, "caption": "Some food \n"},
                {"id": 4, "image_id": 30, "caption": "Nothing."},
                {"id": 5, "image_id": 9},
                {"caption": "Nameless."},
            ],
        },
    )
    expected = [
        ("000000000009.jpg", CAPTION, "A dish."),
        ("broken", "caption 2", "missing image: 000000000025.jpg"),
        ("000000000009.jpg", CAPTION, "Some food"),
        ("broken", "caption 4", "missing image: no image has the id 30"),
        ("broken", "caption 5", "malformed record: KeyError: 'caption'"),
        ("broken", "caption at 5", "malformed record: KeyError: 'image_id'"),
    ]
    assert shown(file) == expected
    assert shown(file.parent) == expected


def test_vqa_v2(tmp_path: Path) -> None:
    draw(tmp_path / "train2014" / "COCO_train2014_000000458752.jpg")
    questions = [
        {"image_id": 458752, "question": "What is this photo taken looking through?",
         "question_id": 458752000},
        {"image_id": 458752, "question": "What position?", "question_id": 458752001},
        {"image_id": 7, "question": "Who?", "question_id": 7000},
    ]  # fmt: skip
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(["mesh", *["net"] * 8, "netting"], 1)
    ]
    rows = [
        {"image_id": row["image_id"], "question_id": row["question_id"], "answers": answers,
         "multiple_choice_answer": "net", "question_type": "what", "answer_type": "other"}
        for row in questions if row["question_id"] != 458752001
    ]  # fmt: skip
    asked = write(
        tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json.gz",
        {"data_subtype": "train2014", "task_type": "Open-Ended", "questions": questions},
    )
    answered = write(
        tmp_path / "v2_mscoco_train2014_annotations.json.gz",
        {"data_subtype": "train2014", "annotations": rows},
    )
    expected = [
        (
            "COCO_train2014_000000458752.jpg",
            f"What is this photo taken looking through?\n{SHORT_ANSWER}",
            "net",
        ),
        ("broken", "question 458752001", "no reply: it has no annotation"),
        (
            "broken",
            "question 7000",
            "missing image: COCO_train2014_000000000007.jpg or 000000000007.jpg",
        ),
    ]
    assert shown(asked) == shown(answered) == shown(tmp_path) == expected
    asked.rename(tmp_path / "other.json.gz")
    with pytest.raises(InputError, match="answers are not beside it"):
        read_conversations(answered)
    (tmp_path / "other.json.gz").rename(asked)
    answered.unlink()
    with pytest.raises(InputError, match=r"The answers to .* are missing"):
        read_conversations(asked)


def test_karpathys_file(tmp_path: Path) -> None:
    draw(tmp_path / "val2014" / "a.jpg", tmp_path / "val2014" / "b.jpg")
    images = [
        {"filepath": "val2014", "filename": f"{name}.jpg", "split": split,
         "sentences": [{"raw": f"{name} {number}.", "tokens": []} for number in range(2)]}
        for name, split in (("a", "restval"), ("b", "val"), ("c", "train"))
    ]  # fmt: skip
    file = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    missing = ("broken", "val2014/c.jpg", "missing image: val2014/c.jpg")
    assert shown(file) == [("a.jpg", CAPTION, "a 0."), ("a.jpg", CAPTION, "a 1."), missing, missing]
    assert shown(file, split="val") == [("b.jpg", CAPTION, "b 0."), ("b.jpg", CAPTION, "b 1.")]
    with pytest.raises(InputError, match="no split test; it has restval, train, val"):
        read_conversations(file, split="test")


def test_captions_by_image(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg")
    file = write(tmp_path / "captions.json.gz", {"a.jpg": ["One.", "Two."]})
    assert shown(file) == [("a.jpg", CAPTION, "One."), ("a.jpg", CAPTION, "Two.")]


def test_flickr8ks_folder(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "a.jpg")
    (tmp_path / "captions.tsv").write_text("a.jpg\tA dog runs .\na.jpg\tIt runs\nc.jpg\tA cat .\n")
    (tmp_path / "train.txt").write_text("a.jpg\nb.jpg\n")
    (tmp_path / "dev.txt").write_text("c.jpg\n")
    assert shown(tmp_path) == [
        ("a.jpg", CAPTION, "A dog runs."),
        ("a.jpg", CAPTION, "It runs."),
        ("broken", "b.jpg", NOTHING),
    ]
    assert shown(tmp_path, split="dev") == [("broken", "c.jpg", "missing image: c.jpg")]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.txt"])
def test_a_folder_with_a_table(name: str, tmp_path: Path) -> None:
    draw(tmp_path / "one" / "a.png", tmp_path / "Images" / "b.png")
    column, text = ("image", "caption") if name == "captions.txt" else ("file_name", "text")
    rows = [
        {column: "one/a.png", text: 'A "red", round ball.'},
        {column: "b.png", text: ""},
        {column: "c.png", text: "A cat."},
        {column: "b.png", text: "A bee."},
    ]
    table = tmp_path / name
    if table.suffix == ".jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        with table.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    found = shown(tmp_path)
    assert found == shown(table)
    assert found[0] == ("a.png", CAPTION, 'A "red", round ball.')
    assert [record[0] for record in found] == ["a.png", "broken", "broken", "b.png"]


def test_a_table_that_names_no_image(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("path,text\na.png,A cat.\n")
    with pytest.raises(InputError, match="no column file_name or image"):
        read_conversations(tmp_path)


def test_a_caption_beside_each_image(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("A cat.\n")
    assert shown(tmp_path) == [
        ("a.jpg", CAPTION, "A cat."),
        ("broken", "b.png", "no reply: b.txt can't be read"),
    ]


def test_what_is_not_recognised_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data set at .*none\.json"):
        read_conversations(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"No data set is recognised in .*captions\.tsv"):
        read_conversations(tmp_path)
    write(tmp_path / "a.json", {"rows": 7})
    with pytest.raises(InputError, match=r"a\.json has none of the layouts"):
        read_conversations(tmp_path)
    write(tmp_path / "b.json", [])
    with pytest.raises(InputError, match=r"several annotation files; give one of a\.json, b\.json"):
        read_conversations(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json can't be read as JSON"):
        read_conversations(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"no folder of images at"):
        read_conversations(tmp_path / "b.json", images=tmp_path / "none")
