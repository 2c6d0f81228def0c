"""Refusing unknown options, with a suggestion of the nearest known name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from fastvlm.functional.errors import InputError


def refuse_unknown(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Refuse options that don't exist.

    Args:
        given: The names that were given.
        known: The names that exist.
        what: What takes them, for the error message: "generate takes".

    Raises:
        InputError: A name is unknown.
    """
    for name in given:
        if name in known:
            continue
        close = get_close_matches(name, known, 1, 0.5)
        right = f"did you mean {close[0]}?" if close else f"{what} {', '.join(known) or 'none'}."
        raise InputError(f"There is no option {name!r} here; {right}")
