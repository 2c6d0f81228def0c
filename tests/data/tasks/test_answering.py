"""Questions with short answers: VQA v2, TextVQA, DocVQA, POPE, MMMU."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm.data.tasks import docvqa, mmmu, pope, textvqa, vqav2
from fastvlm.data.tasks.mmmu import mmmu_questions
from fastvlm.functional.errors import InputError
from fastvlm.metrics.multidiscipline import DISCIPLINES, Key
from tests.data.tasks.published import write_images, write_json, write_lines

SHORT = "\nAnswer the question using a single word or phrase."
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def asked_in_vqa() -> tuple[dict[str, Any], dict[str, Any]]:
    questions = [
        {"image_id": 25, "question": "How many?", "question_id": 250},
        {"image_id": 25, "question": "Is it red?", "question_id": 251},
    ]
    annotations = [
        {"question_id": 251, "answer_type": "yes/no", "answers": [{"answer": "yes"}] * 10},
        {
            "question_id": 250,
            "answer_type": "number",
            "answers": [{"answer": "2"}] * 9 + [{"answer": "3"}],
        },
    ]
    return {"questions": questions}, {"annotations": annotations}


@pytest.mark.parametrize(
    "image", ["val2014/COCO_val2014_000000000025.jpg", "images/000000000025.jpg"]
)
def test_vqav2(tmp_path: Path, image: str) -> None:
    questions, annotations = asked_in_vqa()
    write_json(tmp_path / QUESTIONS, questions)
    write_json(tmp_path / "annotations" / ANNOTATIONS, annotations)
    write_images((tmp_path / image).parent, [Path(image).name])
    task = vqav2(tmp_path)
    assert [(item.id, item.prompt, item.image) for item in task.items] == [
        ("250", f"How many?{SHORT}", tmp_path / image),
        ("251", f"Is it red?{SHORT}", tmp_path / image),
    ]
    assert task.score({"250": "Two.", "251": "no"}) == {
        "accuracy": 0.5,
        "accuracy number": 1,
        "accuracy yes/no": 0,
    }
    # A reply is normalised before it's submitted, even where people's answers are all alike.
    assert task.score({"250": "Two.", "251": "Yes."})["accuracy"] == 1


def test_vqav2_with_a_question_that_nobody_answered(tmp_path: Path) -> None:
    questions, annotations = asked_in_vqa()
    write_json(tmp_path / QUESTIONS, questions)
    write_json(tmp_path / ANNOTATIONS, {"annotations": annotations["annotations"][:1]})
    with pytest.raises(InputError, match=r"1 questions of .* the first of them 250"):
        vqav2(tmp_path)


def test_textvqa(tmp_path: Path) -> None:
    question = {
        "question_id": 34602,
        "image_id": "003a",
        "question": "what is the brand?",
        "answers": ["dakota"] * 10,
    }
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": [question]})
    write_images(tmp_path / "train_images", ["003a.jpg"])
    task = textvqa(tmp_path)
    [item] = task.items
    assert (item.id, item.prompt) == ("34602", f"What is the brand?{SHORT}")
    assert item.image == tmp_path / "train_images" / "003a.jpg"
    assert task.score({"34602": "Dakota"}) == {"accuracy": 1}

    asked = f"What is the brand?\nReference OCR token: DAKOTA{SHORT}"
    with pytest.raises(InputError, match=r"There is no llava_textvqa_val_v051_ocr\.jsonl"):
        textvqa(tmp_path, ocr=True)
    ocr = tmp_path / "llava_textvqa_val_v051_ocr.jsonl"
    write_lines(ocr, [{"question_id": "003a", "text": asked}])
    assert textvqa(tmp_path, ocr=True).items[0].prompt == asked
    write_lines(ocr, [{"question_id": "other", "text": asked}])
    with pytest.raises(InputError, match=r"no question 'what is the brand\?' about 003a"):
        textvqa(tmp_path, ocr=True)


@pytest.mark.parametrize(
    ("name", "place"),
    [("val_v1.0.json", "documents"), ("val_v1.0_withQT.json", "spdocvqa_images")],
)
def test_docvqa(tmp_path: Path, name: str, place: str) -> None:
    question = {
        "questionId": 5,
        "question": "Who?",
        "image": "documents/p_1.png",
        "answers": ["Coca Cola", "Coca Cola Company"],
    }
    write_json(tmp_path / name, {"data": [question]})
    write_images(tmp_path / place, ["p_1.png"])
    task = docvqa(tmp_path)
    [item] = task.items
    assert (item.prompt, item.image) == (f"Who?{SHORT}", tmp_path / place / "p_1.png")
    assert task.score({"5": "CocaCola"}) == {"ANLS": pytest.approx(8 / 9)}


def test_pope(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 2, "image": "b.jpg", "text": "Is there a cat?", "label": "no"},
    ]
    for sampling in ("random", "popular", "adversarial"):
        write_lines(tmp_path / "coco" / f"coco_pope_{sampling}.json", rows)
    write_images(tmp_path / "val2014", ["a.jpg", "b.jpg"])
    task = pope(tmp_path)
    assert [item.id for item in task.items][:3] == ["random/1", "random/2", "popular/1"]
    assert task.items[0].prompt == f"Is there a dog?{SHORT}"
    replies = {item.id: "Yes" if item.id.endswith("/1") else "No" for item in task.items}
    replies["random/1"] = replies["random/2"] = "Yes"
    scores = task.score(replies)
    assert (scores["F1 random"], scores["F1 popular"]) == pytest.approx((2 / 3, 1))
    assert scores["F1"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert scores["accuracy"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert scores["yes ratio random"] == 1


def image_bytes() -> bytes:
    packed = BytesIO()
    Image.new("RGB", (2, 2)).save(packed, "PNG")
    return packed.getvalue()


def rows_of_mmmu(subject: str) -> list[dict[str, Any]]:
    shown = {"bytes": image_bytes(), "path": "a.png"}
    return [
        {
            "id": f"validation_{subject}_1",
            "question": "What is <image 1>?",
            "options": "['$6', 'it\\'s 7']",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": shown,
        },
        {
            "id": f"validation_{subject}_2",
            "question": "Which salt?",
            "options": "[]",
            "answer": "['$MgS$', 'MgS']",
            "question_type": "open",
            "image_1": shown,
        },
        {
            "id": f"validation_{subject}_3",
            "question": "Which interval?",
            "options": "[]",
            "answer": "[0, 1)",
            "question_type": "open",
            "image_1": shown,
        },
    ]


def test_mmmu() -> None:
    task = mmmu_questions(rows_of_mmmu("Chemistry"))
    choice, salt, _ = task.items
    assert choice.prompt == (
        "What is <image 1>?\n(A) $6\n(B) it's 7\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert salt.prompt == f"Which salt?{SHORT}"
    assert choice.image == image_bytes()
    assert task.keys == {
        "validation_Chemistry_1": Key(("B",), ("$6", "it's 7")),
        "validation_Chemistry_2": Key(("$MgS$", "MgS"), None),
        "validation_Chemistry_3": Key(("[0, 1)",), None),
    }
    replies = dict(zip(task.keys, ["(B) it's 7", "It is MgS.", "[0, 2]"], strict=True))
    assert task.score(replies) == pytest.approx({"overall": 2 / 3, "Science": 2 / 3})


def test_mmmu_needs_every_subject(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"30 of 30 subjects have no validation-\*\.parquet"):
        mmmu(tmp_path)


def test_mmmu_from_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for subjects in DISCIPLINES.values():
        for subject in subjects:
            (tmp_path / subject).mkdir()
            table = pyarrow.Table.from_pylist(rows_of_mmmu(subject))
            parquet.write_table(table, tmp_path / subject / "validation-00000-of-00001.parquet")
    task = mmmu(tmp_path)
    assert len(task.items) == 90
    assert task.items[0].id == "validation_Accounting_1"
    assert task.score(dict.fromkeys(task.keys, "B"))["overall"] == pytest.approx(1 / 3)


# Published files, which aren't part of the project.


def test_real_vqav2(data: Path, tmp_path: Path) -> None:
    folder = data / "vqav2_subset"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    (tmp_path / QUESTIONS).symlink_to(folder / "with_images_questions.json")
    (tmp_path / ANNOTATIONS).symlink_to(folder / "with_images_annotations.json")
    (tmp_path / "images").symlink_to(folder / "images")
    task = vqav2(tmp_path)
    assert len(task.items) == 102
    assert len({item.image for item in task.items}) == 67
    assert set(map(len, task.answers.values())) == {10}
    # What most people say is right to most of them.
    most = {key: max(given, key=list(given).count) for key, given in task.answers.items()}
    assert 0.8 < task.score(most)["accuracy"] <= 1
    assert task.score(dict.fromkeys(task.answers, "yes"))["accuracy other"] < 0.1
