"""What was used last is kept, within a number of bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from fastvlm.functional.lru import LruBytes


def keys(cache: LruBytes) -> list[object]:
    return [key for key, _ in cache]


def test_the_least_recently_used_is_dropped_first() -> None:
    cache = LruBytes(10)
    for key in "abc":
        assert cache.put(key, key.upper(), 3)
    assert cache.get("a") == "A"
    assert cache.put("d", "D", 4)
    assert keys(cache) == ["c", "a", "d"]
    assert cache.get("b") is None
    assert (cache.nbytes, len(cache)) == (10, 3)


def test_what_is_larger_than_the_limit_drops_no_other() -> None:
    cache = LruBytes(10)
    cache.put("a", "A", 6)
    assert not cache.put("b", "B", 11)
    assert not cache.put("b", "B", 11, replacing=["a"])
    assert not cache.put("a", "another", 11)
    assert list(cache) == [("a", "A")]
    assert cache.put("b", "B", 10)
    assert list(cache) == [("b", "B")]


@pytest.mark.parametrize("nbytes", [0, 1])
def test_a_limit_of_nothing_keeps_nothing(nbytes: int) -> None:
    cache = LruBytes(0)
    assert not cache.fits(nbytes)
    assert not cache.put("a", "A", nbytes)
    assert cache.get("a") is None


def test_a_value_replaces_those_that_it_makes_needless() -> None:
    cache = LruBytes(10)
    for key in "abc":
        cache.put(key, key.upper(), 3)
    assert cache.put("d", "D", 4, replacing=["b", "c", "unknown"])
    # Room that is made so is made first.
    assert list(cache) == [("a", "A"), ("d", "D")]
    assert cache.put("a", "A2", 2)
    assert list(cache) == [("d", "D"), ("a", "A2")]
    assert cache.nbytes == 6


def test_clear() -> None:
    cache = LruBytes(10)
    cache.put("a", "A", 3)
    cache.clear()
    assert (cache.nbytes, len(cache), cache.get("a")) == (0, 0, None)


def test_iteration_is_over_what_was_there() -> None:
    cache = LruBytes(10)
    cache.put("a", "A", 5)
    cache.put("b", "B", 5)
    found = []
    for key, value in cache:
        cache.put("c", "C", 10)
        found.append((key, value))
    assert found == [("a", "A"), ("b", "B")]


def test_many_threads() -> None:
    cache = LruBytes(50)

    def work(seed: int) -> bool:
        right = True
        for step in range(500):
            number = (step * 7 + seed * 13) % 40
            cache.put(number, str(number), number)
            right &= cache.get(number) in (str(number), None)
            right &= all(str(key) == value for key, value in cache)
            right &= cache.nbytes <= 50
        return right

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert cache.nbytes == sum(key for key, _ in cache)
