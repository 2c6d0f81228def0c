"""What may fail because of one request, and is no matter of its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def attempt(work: Callable[[], Result]) -> Result | Exception:
    """Do what may fail because of one request, and return its result, or the error it failed with.

    A request's strategy, its processors and its criteria may be a user's code, which raises
    anything, and memory may be short; neither is a matter of its neighbours.
    """
    try:
        return work()
    except Exception as error:  # noqa: BLE001 (whatever it is, its request is told)
        return error
