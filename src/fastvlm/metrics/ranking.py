"""Rankings of answer options, as the Visual Dialog challenge scores them.

Retrieval of the human answer (Das et al. 2017, arXiv 1611.08669, section 5) and normalised
discounted cumulative gain over dense relevance (the challenge's evaluation from 2018 on).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from fastvlm.functional.errors import InputError

RECALL_RANKS = (1, 5, 10)


def rank_options(scores: Sequence[float]) -> list[int]:
    """Return the rank of each option, 1 for the highest score; equal scores keep their order.

    Raises:
        InputError: A score is not a number, so that nothing can be said of its rank.
    """
    if any(math.isnan(score) for score in scores):
        raise InputError("Options can't be ranked: the score of one is NaN.")
    order = sorted(range(len(scores)), key=lambda option: -scores[option])
    ranks = [0] * len(scores)
    for place, option in enumerate(order, 1):
        ranks[option] = place
    return ranks


def retrieval_scores(ranks: Sequence[int]) -> dict[str, float]:
    """Score how early the human answers stand.

    Args:
        ranks: The rank of the human answer in each round, from 1 on.

    Returns:
        `R@1`, `R@5`, `R@10` (shares), `MRR` (mean of 1 / rank) and `mean rank`.

    Raises:
        InputError: There are no ranks.
    """
    if not ranks:
        raise InputError("There are no ranks to score.")
    recalls = {f"R@{most}": fmean(rank <= most for rank in ranks) for most in RECALL_RANKS}
    return {**recalls, "MRR": fmean(1 / rank for rank in ranks), "mean rank": fmean(ranks)}


def ndcg(ranks: Sequence[int], relevance: Sequence[float]) -> float:
    """Compute the normalised discounted cumulative gain of one round.

    The gain of the first k options in the ranking over that of the best k, each option's relevance
    divided by log2(rank + 1), where k is the number of options of any relevance.

    Args:
        ranks: The rank of each option, from 1 on.
        relevance: Of each option, the share of people who found it right.

    Returns:
        0 to 1.

    Raises:
        InputError: Ranks and relevances differ in number, or no option is relevant.
    """
    if len(ranks) != len(relevance):
        raise InputError(f"{len(ranks)} options are ranked, but {len(relevance)} have a relevance.")
    relevant = sum(value != 0 for value in relevance)
    if not relevant:
        raise InputError("NDCG is undefined where no option is relevant.")
    gain = sum(
        value / math.log2(rank + 1)
        for rank, value in zip(ranks, relevance, strict=True)
        if rank <= relevant
    )
    best = sorted(relevance, reverse=True)[:relevant]
    return gain / sum(value / math.log2(rank + 1) for rank, value in enumerate(best, 1))
