"""What may fail because of one request, and is no matter of its neighbours."""

from __future__ import annotations

from collections.abc import Callable


def attempt(work: Callable[[], None]) -> Exception | None:
    """Do what may fail because of one request, and return the error that it failed with.

    A request's strategy, its processors and its criteria may be a user's code, which raises
    anything, and memory may be short; neither is a matter of its neighbours.
    """
    try:
        work()
    except Exception as error:  # noqa: BLE001 (whatever it is, its request is told)
        return error
    return None
