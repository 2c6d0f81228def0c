"""Scores from a judge's grades: MM-Vet's and LLaVA-Bench's.

The judge is another model (GPT-4 in both papers); these functions only average what it said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from fastvlm.functional.errors import InputError

HIGHEST_GRADE = 1.0


def capability_scores(
    grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Iterable[str]]
) -> dict[str, float]:
    """Average MM-Vet's grades by capability (Yu et al. 2023, arXiv 2308.02490, section 3.3).

    Args:
        grades: By question, a grade from 0 to 1 of each of the judge's runs.
        capabilities: By question, what it takes, such as `ocr` and `math`: a question counts in
            full for each.

    Returns:
        The mean grade of each capability's questions and of all (`total`), 0 to 100.

    Raises:
        InputError: There are no grades, one is outside 0 to 1, or a question has none.
    """
    if not grades:
        raise InputError("There are no grades to average.")
    by_capability: dict[str, list[float]] = {}
    for question, runs in grades.items():
        if not runs or not all(0 <= grade <= HIGHEST_GRADE for grade in runs):
            raise InputError(f"The grades of {question!r} must be from 0 to 1, not {list(runs)!r}.")
        for capability in (*capabilities[question], "total"):
            by_capability.setdefault(capability, []).append(fmean(runs))
    return {capability: 100 * fmean(means) for capability, means in by_capability.items()}


def relative_scores(
    reviews: Mapping[str, tuple[float, float]], categories: Mapping[str, str]
) -> dict[str, float]:
    """Compare LLaVA-Bench's replies with the references (Liu et al. 2023, arXiv 2304.08485).

    Args:
        reviews: By question, the judge's grades (1 to 10) of the reference answer and the reply.
        categories: By question, `conv`, `detail` or `complex`.

    Returns:
        100 times the replies' mean grade over the references' mean grade, of each category's
        questions and of `all`.

    Raises:
        InputError: There are no reviews, or a grade is not positive: where a judge's review can't
            be read, some tools write -1.
    """
    if not reviews:
        raise InputError("There are no reviews to average.")
    by_category: dict[str, list[tuple[float, float]]] = {}
    for question, pair in reviews.items():
        if min(pair) <= 0:
            raise InputError(f"The review of {question!r} has no positive grades: {pair!r}.")
        for category in (categories[question], "all"):
            by_category.setdefault(category, []).append(pair)
    return {
        category: 100 * sum(reply for _, reply in pairs) / sum(reference for reference, _ in pairs)
        for category, pairs in by_category.items()
    }
