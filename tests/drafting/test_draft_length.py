"""How long a draft goes on."""

from __future__ import annotations

import math

import pytest

from fastvlm.drafting import ConfidenceLength, DraftLength, FixedLength
from fastvlm.drafting.draft_length import Progress
from fastvlm.functional.errors import InputError


def drafted(length: DraftLength, confidences: list[float]) -> int:
    """How many tokens a drafter with these confidences drafts."""
    progress = Progress([True], [[]], [100], [1])
    while length.should_continue(progress) == [True]:
        progress.confidences[0].append(confidences[progress.steps])
    return progress.steps


@pytest.mark.parametrize("maximum", [1, 2, 7])
def test_a_fixed_draft_has_its_length(maximum: int) -> None:
    length = FixedLength(maximum)
    assert drafted(length, [0.0] * 10) == drafted(length, [1.0] * 10) == maximum
    assert not length.reads_confidence


def test_a_draft_ends_with_the_first_unsure_token() -> None:
    length = ConfidenceLength(4, 0.6)
    assert length.reads_confidence
    assert drafted(length, [0.59, 1, 1, 1, 1]) == 1
    assert drafted(length, [0.6, 0.9, 0.5, 1, 1]) == 3
    assert drafted(length, [1, 1, 1, 1, 1]) == 4


def test_a_threshold_may_be_at_either_end() -> None:
    assert drafted(ConfidenceLength(5, 0), [0.0] * 9) == 5
    assert drafted(ConfidenceLength(5, 1), [1.0, 0.999, 1.0]) == 2


@pytest.mark.parametrize("maximum", [0, -1])
def test_a_draft_without_tokens_is_refused(maximum: int) -> None:
    for length in (FixedLength, ConfidenceLength):
        with pytest.raises(InputError, match=f"at least one token; got .*{maximum}"):
            length(maximum)


@pytest.mark.parametrize("threshold", [-0.1, 1.01, math.nan, math.inf])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match=f"between 0 and 1; got {threshold}"):
        ConfidenceLength(8, threshold)
