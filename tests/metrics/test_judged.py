"""Averages of a judge's grades; the published ones are in the tests of the tasks."""

import pytest

from fastvlm.functional.errors import InputError
from fastvlm.metrics.judged import capability_scores, relative_scores


def test_a_question_counts_for_each_capability() -> None:
    grades = {"a": [1.0, 0.5], "b": [0.0, 0.5], "c": [0.25, 0.25]}
    capabilities = {"a": ["ocr", "math"], "b": ["ocr"], "c": ["rec"], "d": ["spat"]}
    assert capability_scores(grades, capabilities) == pytest.approx(
        {"ocr": 50, "math": 75, "rec": 25, "total": 100 * (0.75 + 0.25 + 0.25) / 3}
    )


@pytest.mark.parametrize("runs", [[], [1.1], [0.5, -0.1]])
def test_grades_must_be_shares(runs: list[float]) -> None:
    with pytest.raises(InputError, match="grades of 'a' must be from 0 to 1"):
        capability_scores({"a": runs}, {"a": ["ocr"]})
    with pytest.raises(InputError, match="no grades"):
        capability_scores({}, {})


def test_replies_are_compared_by_category() -> None:
    # The ratio of means, not the mean of ratios.
    reviews = {"a": (8.0, 4.0), "b": (2.0, 4.0), "c": (10.0, 5.0)}
    categories = {"a": "conv", "b": "conv", "c": "complex"}
    assert relative_scores(reviews, categories) == pytest.approx(
        {"conv": 80, "complex": 50, "all": 65}
    )


def test_a_review_that_was_not_read_is_named() -> None:
    with pytest.raises(InputError, match="review of 'b' has no positive grades"):
        relative_scores({"a": (8.0, 4.0), "b": (-1.0, -1.0)}, {"a": "conv", "b": "conv"})
    with pytest.raises(InputError, match="no reviews"):
        relative_scores({}, {})
