"""Rankings of options: by hand, and against what the official metrics gave."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from statistics import fmean

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


def test_published_visdial(data: Path) -> None:
    folder = data / "visdial" / "vispro"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    packed = (folder / "visdial_1.0_val_vispro.json.gz").read_bytes()
    dialogues = json.loads(gzip.decompress(packed))["data"]["dialogs"]
    dense = json.loads(
        (folder / "visdial_1.0_val_dense_annotations_vispro.json").read_text(encoding="utf-8")
    )
    relevance = {(line["image_id"], line["round_id"]): line["gt_relevance"] for line in dense}
    given = Counter(turn["answer"] for dialogue in dialogues for turn in dialogue["dialog"])
    found, gains = [], []
    for dialogue in dialogues:
        for number, turn in enumerate(dialogue["dialog"], 1):
            # By frequency, then by the answer's number.
            ranks = rank_options([given[key] - key * 1e-6 for key in turn["answer_options"]])
            found.append(ranks[turn["gt_index"]])
            if (dialogue["image_id"], number) in relevance:
                gains.append(ndcg(ranks, relevance[dialogue["image_id"], number]))
    assert retrieval_scores(found) == pytest.approx(
        {
            "R@1": 0.180263,
            "R@5": 0.365789,
            "R@10": 0.4,
            "MRR": 0.301707,
            "mean rank": 12.793421,
        },
        abs=5e-7,
    )
    assert len(gains) == 76
    assert fmean(gains) == pytest.approx(0.284783, abs=5e-7)
