"""Rankings of options by hand; what the official metrics gave is in the test of the task."""

from __future__ import annotations

import math

import pytest

from fastvlm.functional.errors import InputError
from fastvlm.metrics.ranking import ndcg, rank_options, retrieval_scores


def test_the_highest_score_ranks_first_and_equal_ones_keep_their_order() -> None:
    assert rank_options([-3.0, -1.0, -2.0]) == [3, 1, 2]
    assert rank_options([0.5, 1, 0.5, 1]) == [3, 1, 4, 2]
    assert rank_options([-math.inf, 0]) == [2, 1]


def test_retrieval_by_hand() -> None:
    scores = retrieval_scores([1, 2, 6, 20])
    assert scores == pytest.approx(
        {
            "R@1": 1 / 4,
            "R@5": 2 / 4,
            "R@10": 3 / 4,
            "MRR": (1 + 1 / 2 + 1 / 6 + 1 / 20) / 4,
            "mean rank": 29 / 4,
        }
    )


def test_ndcg_by_hand() -> None:
    relevance = [0.0, 1.0, 0.5, 0.0]
    assert ndcg([3, 1, 2, 4], relevance) == pytest.approx(1)
    # Two are relevant, so two places count: only the second holds anything, a relevance of 1.
    best = 1 / math.log2(2) + 0.5 / math.log2(3)
    assert ndcg([1, 2, 4, 3], relevance) == pytest.approx(1 / math.log2(3) / best)
    assert ndcg([1, 3, 4, 2], relevance) == 0


def test_what_can_not_be_ranked_is_said() -> None:
    with pytest.raises(InputError, match="NaN"):
        rank_options([0.0, math.nan])
    with pytest.raises(InputError, match="no ranks"):
        retrieval_scores([])
    with pytest.raises(InputError, match="no option is relevant"):
        ndcg([1, 2], [0.0, 0.0])
    with pytest.raises(InputError, match="2 options are ranked, but 1"):
        ndcg([1, 2], [1.0])
