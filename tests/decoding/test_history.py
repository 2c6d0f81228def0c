"""Copies from a history, against the naive search."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from fastvlm.decoding.history import LONGEST_MATCH, Copy, History


def naive(tokens: Sequence[int], known: int, ngram: int, most: int) -> Copy | None:
    """Search for the longest n-gram at the end, then for its latest earlier occurrence."""
    for size in range(min(ngram, len(tokens)), 0, -1):
        pattern = list(tokens[-size:])
        for start in range(min(known, len(tokens)) - 1, size - 1, -1):
            if list(tokens[start - size : start]) != pattern:
                continue
            match = size
            while (
                match < min(LONGEST_MATCH, start)
                and tokens[start - match - 1] == tokens[-match - 1]
            ):
                match += 1
            copied = list(tokens[start:])
            while len(copied) < most:
                copied += copied
            return Copy(copied[:most], match)
    return None


@pytest.mark.parametrize("ngram", [1, 2, 3])
@pytest.mark.parametrize("vocabulary", [2, 5, 40])
def test_a_copy_is_what_the_naive_search_finds(ngram: int, vocabulary: int) -> None:
    chance = random.Random(vocabulary)
    found = 0
    for _ in range(150):
        tokens = [chance.randrange(vocabulary) for _ in range(chance.randrange(1, 60))]
        cut, most = chance.randrange(len(tokens)), chance.randrange(1, 12)
        history = History(ngram)
        history.extend(tokens[:cut])
        history.extend(tokens[cut:])
        copy = history.look_up([], most)
        assert copy == naive(tokens, len(tokens), ngram, most)
        found += copy is not None
        # What is drafted is looked up, too, and copied where a copy reaches it.
        drafted = [chance.randrange(vocabulary) for _ in range(3)]
        copy = history.look_up(drafted, most)
        assert copy == naive([*tokens, *drafted], len(tokens), ngram, most)
    assert found > 20


def test_what_repeats_is_copied_beyond_its_end() -> None:
    history = History(3)
    history.extend([7, 1, 2, 3, 1, 2, 3, 1, 2, 3])
    assert history.look_up([], 8) == Copy([1, 2, 3, 1, 2, 3, 1, 2], 6)
    assert history.look_up([1], 4) == Copy([2, 3, 1, 2], 7)
    assert history.look_up([9], 4) is None
