"""Replacing a method of an object for the calls of one thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Replacement = Callable[..., Any]
"""Called as `replacement(original, *args, **kwargs)` in place of the method."""

_LOCK = threading.Lock()
_ABSENT = object()


class _Override:
    """A method that is replaced by now, in at least one thread.

    Args:
        owner: The object; it is kept alive, so that its id stays its own.
        name: The method's name.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.original: Callable[..., Any] = getattr(owner, name)
        # What hides the class's method already, such as the forward of accelerate's hooks.
        self.previous: Any = vars(owner).get(name, _ABSENT)
        self.users = 0
        self.local = threading.local()

        # `generate` reads the signatures of the methods that it calls.
        @functools.wraps(self.original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self.call(*args, **kwargs)

        self.wrapper = wrapper

    @property
    def replacements(self) -> list[Replacement]:
        """The replacements of this thread; the last one is called."""
        if not hasattr(self.local, "stack"):
            self.local.stack = []
        stack: list[Replacement] = self.local.stack
        return stack

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call this thread's replacement, or the method itself in any other thread."""
        stack = self.replacements
        if stack:
            return stack[-1](self.original, *args, **kwargs)
        return self.original(*args, **kwargs)

    def install(self) -> None:
        """Hide the method."""
        setattr(self.owner, self.name, self.wrapper)

    def restore(self) -> None:
        """Leave the object as it was, unless somebody else has replaced the method since."""
        if vars(self.owner).get(self.name) is not self.wrapper:
            return
        if self.previous is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.previous)


_active: dict[tuple[int, str], _Override] = {}


@contextmanager
def override_method(owner: object, name: str, replacement: Replacement) -> Iterator[None]:
    """Replace a method of an object in this context, for calls from this thread only.

    Other threads call the method itself meanwhile. When the last context ends, in whichever thread,
    the object has the attributes that it had before the first began.

    Args:
        owner: The object.
        name: The method's name.
        replacement: Called in its place; its first argument is the method itself.
    """
    key = id(owner), name
    with _LOCK:
        override = _active.get(key)
        if override is None:
            override = _active[key] = _Override(owner, name)
            override.install()
        override.users += 1
    override.replacements.append(replacement)
    try:
        yield
    finally:
        override.replacements.pop()
        with _LOCK:
            override.users -= 1
            if not override.users:
                override.restore()
                del _active[key]
