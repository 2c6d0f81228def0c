"""Applying a function to items, in order, ahead of time in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result]:
    """Yield the results of a function on items, in order.

    Two results for each thread are held ready. For functions that let other threads compute
    meanwhile, as decoding an image does.

    Args:
        function: The function.
        items: The items, read in the caller's thread.
        threads: The number of threads.

    Raises:
        Exception: The function or the items raised it.
    """
    source = iter(items)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "fastvlm-ahead") as pool:
        try:
            for item in source:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
