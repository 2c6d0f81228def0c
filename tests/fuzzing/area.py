"""What is fuzzed: a kind of thing that users give."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

from hypothesis.strategies import SearchStrategy


class WrongError(Exception):
    """A result that is not the right one."""


class Area(Protocol):
    """A kind of thing that users give, made once in a process and then used for many cases.

    Args:
        folder: An empty folder for what the cases start from.
    """

    name: ClassVar[str]
    share: ClassVar[float]
    """Its share of all cases."""

    def __init__(self, folder: Path) -> None: ...

    def cases(self) -> SearchStrategy[Any]:
        """Return what draws a case, which is plain data."""
        ...

    def check(self, case: Any) -> None:
        """Do with a case what a user does.

        Raises:
            FastVlmError: It is refused in a sentence.
            WrongError: The result is not right.
        """
        ...
