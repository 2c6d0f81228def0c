"""Short answers: by hand, against a slow and obvious version, and against published figures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fastvlm.functional.errors import InputError
from fastvlm.metrics.answers import anls, normalize_answer, textvqa_accuracy, vqa_accuracy

WORDS = ["2", "two", "a dog", "dog", "Dog.", "the dog", "can't", "cant", "red, blue", "red blue"]


def naive_agreement(reply: str, people: list[str]) -> float:
    """The official loop: leave one person out, count who of the others says the same."""
    total = 0.0
    for left_out in range(len(people)):
        others = [answer for index, answer in enumerate(people) if index != left_out]
        total += min(1.0, sum(answer == reply for answer in others) / 3)
    return total / len(people)


def naive_distance(first: str, second: str) -> int:
    if not first or not second:
        return len(first) + len(second)
    return min(
        naive_distance(first[1:], second) + 1,
        naive_distance(first, second[1:]) + 1,
        naive_distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("A Dog.", "dog"),
        ("the  dog and an apple", "dog and apple"),
        ("Ten", "10"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("'ow'sat", "'ow's'at"),
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        # A mark between letters becomes a space, one beside a space nothing.
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("what?", "what"),
        # A comma within a number takes all marks with it, and leaves nothing in their place.
        ("1,000", "1000"),
        ("1,000/year", "1000year"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        # Colons and apostrophes are no punctuation here.
        ("10:30", "10:30"),
        ("man's", "man's"),
    ],
)
def test_answers_are_normalised(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


def test_only_so_many_periods_are_removed() -> None:
    # An oddity of the official code, kept: it removes at most 32.
    assert normalize_answer("." * 40) == "." * 8


def test_an_answer_counts_by_those_who_agree() -> None:
    people = ["cat"] * 2 + ["dog"] * 8
    # Left out, each of two leaves one other: 1/3; the other eight find two: 2/3.
    assert vqa_accuracy("cat", people) == pytest.approx((2 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("dog", people) == 1
    assert vqa_accuracy("bird", people) == 0
    assert vqa_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)


def test_answers_are_normalised_only_where_people_differ() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("two", ["2"] * 5 + ["Two"] * 5) == 1
    # TextVQA's evaluation always normalises.
    assert textvqa_accuracy("Yes", ["yes"] * 10) == 1


def test_textvqa_reads_possessives_and_commas_its_own_way() -> None:
    assert textvqa_accuracy("King's Cross?", ["king 's cross"] * 10) == 1
    assert textvqa_accuracy("a,b", ["ab"] * 10) == 1
    assert vqa_accuracy("a,b", ["ab"] * 9 + ["c"]) == 0


def test_agreement_equals_the_obvious_version() -> None:
    for _ in range(200):
        people = random.choices(WORDS, k=random.randint(1, 10))
        reply = random.choice(WORDS)
        normal = [normalize_answer(answer) for answer in people]
        alike = len(set(people)) == 1
        expected = (
            naive_agreement(reply, people)
            if alike
            else naive_agreement(normalize_answer(reply), normal)
        )
        assert vqa_accuracy(reply, people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reply", "score"),
    [("CocaCola", 8 / 9), ("Coca cola", 1), ("The Coca", 0), ("Cola", 0), (" coca   COLA ", 1)],
)
def test_anls_of_close_answers(reply: str, score: float) -> None:
    assert anls(reply, ["Coca Cola", "Coca Cola Company"]) == pytest.approx(score)


def test_anls_at_its_threshold_and_of_nothing() -> None:
    assert anls("ab", ["abcd"]) == 0.5
    assert anls("ab", ["abcde"]) == 0
    assert anls("", ["a"]) == 0
    assert anls("", [""]) == 1


def test_anls_equals_the_obvious_version() -> None:
    for _ in range(100):
        reply, answer = ("".join(random.choices("abc", k=random.randint(1, 5))) for _ in range(2))
        similarity = 1 - naive_distance(reply, answer) / max(len(reply), len(answer))
        expected = similarity if similarity >= 0.5 else 0
        assert anls(reply, [answer]) == pytest.approx(expected)


def test_answers_are_needed() -> None:
    with pytest.raises(InputError, match="without a right answer"):
        anls("x", [])
    with pytest.raises(InputError, match="without the answers of people"):
        vqa_accuracy("x", [])


def test_published_anls(data: Path) -> None:
    folder = data / "metric_fixtures" / "anls" / "evaluation" / "evaluate_json"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    gold = json.loads((folder / "gold_label.json").read_text(encoding="utf-8"))["data"]
    submission = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    said = {line["questionId"]: line["answer"] for line in submission}
    scores = [anls(said[line["questionId"]], line["answers"]) for line in gold]
    assert sum(scores) / len(scores) == pytest.approx(0.378, abs=5e-4)


def test_published_textvqa(data: Path) -> None:
    file = data / "metric_fixtures" / "textvqa_28.jsonl"
    if not file.is_file():
        pytest.skip(f"No file {file}.")
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        score = textvqa_accuracy(row["prediction"], row["answers"])
        assert score == pytest.approx(row["reported_score"]), row["question"]
