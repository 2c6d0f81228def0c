"""MMMU's answers: how replies are read, and its published accuracies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvlm.functional.errors import InputError
from fastvlm.metrics.multidiscipline import (
    DISCIPLINES,
    Key,
    discipline_scores,
    is_right_open,
    parse_choice,
    parse_open,
    subject_of,
)

OPTIONS = ("a red car", "a blue boat", "the plane", "42")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is (A), not (D)", "D"),
        ("(A) or B", "A"),  # brackets before bare letters
        ("I think A or C .", "C"),
        ("It must be a blue boat, I think", "B"),
        ("First a red car and then a blue boat", "B"),
        ("blue boat", None),  # too short to quote an option
        ("E", None),
        ("", None),
    ],
)
def test_a_choice_is_read(reply: str, letter: str | None) -> None:
    assert parse_choice(reply, OPTIONS) == letter


def test_open_replies_are_reduced_to_conclusions_and_numbers() -> None:
    # The conclusion as a number, and the numbers that are found in it.
    assert parse_open("The sum is 1,234.5.") == {1234.5, 1234.0, 234.5}
    assert parse_open("We get x = 3e2\nso y = 4.567") == {4.57}  # "=" concludes the last line only
    assert parse_open("It is 5 m long.") == {"5 m long", 5.0}
    assert parse_open("Paris") == {"paris"}
    assert parse_open("C") == {" c", "c "}


@pytest.mark.parametrize(
    ("reply", "answers", "right"),
    [
        ("The answer is 24.318.", ["24.32"], True),
        ("24.33", ["24.32"], False),
        ("It is the Transformation of X", ["Transformation"], True),
        ("I don't know", ["MgS", "$MgS$"], False),
        ("so it is MgS", ["$MgS$", "MgS"], True),
        ("1,000", ["1000"], True),
        ("cat", ["C"], False),  # a single letter is no match within a word
        ("it is option c here", ["C"], True),
    ],
)
def test_open_replies_are_judged(reply: str, answers: list[str], right: bool) -> None:
    assert is_right_open(reply, answers) is right


def test_scores_by_discipline() -> None:
    keys = {
        "validation_Art_1": Key(("A",), OPTIONS),
        "validation_Art_Theory_1": Key(("B",), OPTIONS),
        "validation_Math_7": Key(("12",), None),
        "validation_Music_2": Key(("C",), OPTIONS),
    }
    replies = {"validation_Art_1": "A", "validation_Art_Theory_1": "A", "validation_Math_7": "12.0"}
    assert discipline_scores(replies, keys) == pytest.approx(
        {"overall": 2 / 3, "Art and Design": 1 / 2, "Science": 1}
    )


def test_replies_that_name_no_option_are_drawn_alike_each_time() -> None:
    keys = {f"validation_Art_{number}": Key(("A",), OPTIONS) for number in range(400)}
    replies = dict.fromkeys(keys, "no idea")
    scores = discipline_scores(replies, keys)
    assert scores == discipline_scores(replies, keys)
    assert scores["overall"] == pytest.approx(1 / 4, abs=0.08)


def test_subjects() -> None:
    assert subject_of("validation_Energy_and_Power_12") == "Energy_and_Power"
    assert sum(map(len, DISCIPLINES.values())) == 30
    with pytest.raises(InputError, match="'validation_Cooking_1'"):
        subject_of("validation_Cooking_1")
    with pytest.raises(InputError, match="no replies"):
        discipline_scores({}, {})


@pytest.mark.parametrize("raw", [False, True])
def test_published_mmmu(data: Path, raw: bool) -> None:
    folder = data / "mmmu"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    outputs = folder / "example_outputs" / "llava1.5_13b"
    rows = {
        row["id"]: row
        for file in outputs.glob("*/output.json")
        for row in json.loads(file.read_text(encoding="utf-8"))
    }
    published = json.loads((folder / "answer_dict_val.json").read_text(encoding="utf-8"))
    keys = {
        question: Key(
            tuple(truth) if isinstance(truth := line["ground_truth"], list) else (truth,),
            tuple(rows[question]["index2ans"].values())
            if line["question_type"] == "multiple-choice"
            else None,
        )
        for question, line in published.items()
    }
    # The replies as LLaVA wrote them, and as MMMU's authors read them.
    parsed = json.loads((outputs / "total_val_output.json").read_text(encoding="utf-8"))
    replies = {question: row["response"] for question, row in rows.items()} if raw else parsed
    scores = discipline_scores(replies, keys)
    assert {name: round(score, 3) for name, score in scores.items()} == {
        "overall": 0.367,
        "Art and Design": 0.525,
        "Business": 0.227,
        "Science": 0.293,
        "Health and Medicine": 0.387,
        "Humanities and Social Science": 0.55,
        "Tech and Engineering": 0.31,
    }
