"""Options: what a command line says of a dataclass's field, and names that nothing takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from fastvlm.functional.errors import InputError


@dataclass(frozen=True, slots=True)
class Option:
    """Makes a dataclass's field an option of the command line, as `Annotated[int, Option(...)]`.

    Name, type and default are the field's own, so Python and the command line have one definition.

    Args:
        help: What the option does.
        metavar: What stands for the value in the help.
        min: The least value.
        max: The greatest value.
        flag: The option's name where it is not the field's, such as `--random-start`.
    """

    help: str
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    flag: str | None = None


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
