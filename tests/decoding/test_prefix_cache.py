"""The longest known beginning of a prompt is found, within a limit of bytes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastvlm.decoding.prefix_cache import PrefixCache, PrefixEntry, shared_length
from fastvlm.functional.lru import LruBytes

LAYERS, HEADS, SIZE = 2, 1, 4
POSITION = 2 * LAYERS * HEADS * SIZE * 4
"""Bytes of one position, in float32."""


def entry(keys: Sequence[Hashable], exits: bool = False) -> PrefixEntry:
    state = {layer: torch.zeros(2, HEADS, len(keys), SIZE) for layer in range(LAYERS)}
    return PrefixEntry(list(keys), state, {1: torch.zeros(len(keys), 8)} if exits else {})


def put(cache: PrefixCache, keys: Sequence[Hashable]) -> bool:
    return cache.put(keys, len(keys) * POSITION, lambda: entry(keys))


def kept(cache: PrefixCache) -> list[list[Hashable]]:
    return [value.keys for _, value in cache.lru]


def test_the_size_of_an_entry() -> None:
    assert entry("abc").nbytes == 3 * POSITION
    assert entry("abc", exits=True).nbytes == 3 * (POSITION + 8 * 4)


def test_the_longest_beginning_is_found() -> None:
    cache = PrefixCache(LruBytes(100 * POSITION))
    assert cache.match("abc") is None
    for keys in ("abcd", "abxyz", "q"):
        assert put(cache, keys)
    for keys, entry_keys, length in [
        ("abcd", "abcd", 4),
        ("abcdefg", "abcd", 4),
        ("abc", "abcd", 3),
        ("abxyw", "abxyz", 4),
        ("qq", "q", 1),
    ]:
        hit = cache.match(keys)
        assert hit is not None
        assert ("".join(hit.entry.keys), hit.length) == (entry_keys, length)
    assert cache.match("zab") is None
    assert cache.match("") is None


def test_of_equals_the_most_recently_used_is_found() -> None:
    cache = PrefixCache(LruBytes(100 * POSITION))
    put(cache, "ax")
    put(cache, "ay")
    assert cache.match("a").entry.keys == ["a", "y"]
    cache.match("ax")
    assert cache.match("a").entry.keys == ["a", "x"]


def test_a_continuation_replaces_what_it_continues() -> None:
    cache = PrefixCache(LruBytes(100 * POSITION))
    for keys in ("ab", "abc", "x", "abcd", "abcd"):
        assert put(cache, keys)
    assert kept(cache) == [["x"], list("abcd")]
    assert cache.lru.nbytes == 5 * POSITION
    # What ends earlier may have what the longer one lacks: both stay.
    assert put(cache, "ab")
    assert len(kept(cache)) == 3


def test_what_is_too_large_is_neither_made_nor_drops_anything() -> None:
    cache = PrefixCache(LruBytes(4 * POSITION))
    put(cache, "abc")

    def never() -> PrefixEntry:
        raise AssertionError

    assert not cache.put("abcde", 5 * POSITION, never)
    assert not PrefixCache(LruBytes(0)).put("a", 0, never)
    assert not cache.put("", 0, never)
    # Also if it was said to be smaller than it is.
    assert not cache.put("abcde", POSITION, lambda: entry("abcde"))
    assert kept(cache) == [list("abc")]


def test_what_was_used_longest_ago_makes_room() -> None:
    cache = PrefixCache(LruBytes(6 * POSITION))
    for keys in ("ab", "cd", "ef"):
        put(cache, keys)
    cache.match("ab")
    put(cache, "gh")
    assert kept(cache) == [list("ef"), list("ab"), list("gh")]


def test_other_values_in_the_same_lru_are_no_prefixes() -> None:
    lru = LruBytes(100 * POSITION)
    one, other = PrefixCache(lru), PrefixCache(lru)
    lru.put("abc", torch.zeros(3), 12)
    put(one, "abc")
    # Another model's states.
    put(other, "abcd")
    assert one.match("abcd").length == 3
    assert other.match("abcd").length == 4
    assert len(lru) == 3
    lru.clear()
    assert one.match("abc") is None


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 64, 100])
def test_the_shared_length_is_that_of_a_comparison_one_by_one(length: int) -> None:
    for place in range(length + 1):
        one = list(range(length))
        other = [-1 if index == place else index for index in one]
        assert shared_length(one, other) == place
        assert shared_length(one, [*other[:place], 5, 5]) >= place
        assert shared_length(one, one[:place]) == place


def test_many_threads() -> None:
    cache = PrefixCache(LruBytes(20 * POSITION))

    def work(seed: int) -> bool:
        right = True
        for step in range(200):
            keys = [(seed * 7 + step) % 5, *range(step % 9)]
            put(cache, keys)
            hit = cache.match(keys)
            right &= hit is None or hit.entry.keys[: hit.length] == keys[: hit.length]
            right &= cache.lru.nbytes <= cache.lru.limit
        return right

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
