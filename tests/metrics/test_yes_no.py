"""Yes or no: what a reply means, and the scores by hand."""

import pytest

from fastvlm.functional.errors import InputError
from fastvlm.metrics.yes_no import says_yes, yes_no_scores


@pytest.mark.parametrize(
    ("reply", "yes"),
    [
        ("Yes", True),
        ("no", False),
        ("No, there is none.", False),
        ("There is not a dog", False),
        ("Yes. But no cat.", True),
        ("There is no dog. Yes.", False),
        ("Nothing", True),
        ("", True),
        ("NO", True),  # only "No" and "no" are looked for, as in POPE's own evaluation
    ],
)
def test_replies_are_read_as_pope_reads_them(reply: str, yes: bool) -> None:
    assert says_yes(reply) is yes


def test_scores_by_hand() -> None:
    # Two hits, one false alarm, one miss, one right no.
    scores = yes_no_scores([True, True, True, False, False], [True, True, False, True, False])
    assert scores == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "yes ratio": 3 / 5}
    )


def test_scores_of_a_model_that_always_says_the_same() -> None:
    assert yes_no_scores([False, False], [True, False]) == pytest.approx(
        {"accuracy": 0.5, "precision": 0, "recall": 0, "F1": 0, "yes ratio": 0}
    )
    assert yes_no_scores([True, True], [True, False]) == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1, "F1": 2 / 3, "yes ratio": 1}
    )


def test_answers_and_labels_must_match() -> None:
    with pytest.raises(InputError, match="0 answers"):
        yes_no_scores([], [])
    with pytest.raises(InputError, match="1 answers can't be scored against 2 labels"):
        yes_no_scores([True], [True, False])
