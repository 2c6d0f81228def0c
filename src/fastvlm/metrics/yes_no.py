"""Yes-or-no questions about objects, as POPE scores them (Li et al. 2023, arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Sequence

from fastvlm.functional.errors import InputError

_NEGATIONS = frozenset(["No", "no", "not"])


def says_yes(reply: str) -> bool:
    """Whether a reply means yes: its first sentence has none of "No", "no" and "not"."""
    first = reply.split(".", maxsplit=1)[0]
    return _NEGATIONS.isdisjoint(first.replace(",", "").split(" "))


def yes_no_scores(said: Sequence[bool], right: Sequence[bool]) -> dict[str, float]:
    """Score answers; "yes" is what is to be found.

    Args:
        said: Whether the model said yes, by question.
        right: Whether yes is right, by question.

    Returns:
        `accuracy`, `precision`, `recall`, `F1` and `yes ratio`, 0 to 1. Precision is 0 where the
        model never said yes, recall where yes is never right, F1 where both are.

    Raises:
        InputError: There are no questions, or the two differ in number.
    """
    if not said or len(said) != len(right):
        raise InputError(
            f"{len(said)} answers can't be scored against {len(right)} labels; there must be one"
            " answer or more, and a label for each."
        )
    hits = sum(ours and theirs for ours, theirs in zip(said, right, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(right) if any(right) else 0.0
    agreed = sum(ours == theirs for ours, theirs in zip(said, right, strict=True))
    return {
        "accuracy": agreed / len(said),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes ratio": sum(said) / len(said),
    }
