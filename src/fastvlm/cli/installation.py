"""Faults of an installation, and how to fix them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata


def torchvision_mismatch(
    error: BaseException,
    version: Callable[[str], str] = metadata.version,
    requires: Callable[[str], Sequence[str] | None] = metadata.requires,
) -> str | None:
    """Return how to fix an error that was caused by a torchvision built for another torch.

    `transformers` imports torchvision wherever it is installed, and one that was built for another
    torch makes that import fail with errors that name neither cause nor fix.

    Args:
        error: The error; the errors that caused it are examined too.
        version: Returns an installed package's version.
        requires: Returns an installed package's requirements.

    Returns:
        One sentence, or None if the error has another cause.
    """
    if not any("torchvision" in str(link) for link in _chain(error)):
        return None
    try:
        ours, torch = version("torchvision"), version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        return None
    built_for = _pinned_torch(requires("torchvision") or ())
    origin = "" if built_for in (None, torch) else f", which was built for torch {built_for},"
    return (
        f"The installed torchvision {ours}{origin} doesn't work with the installed torch {torch};"
        " remove it with `pip uninstall torchvision` (fastvlm doesn't need it) or install the one"
        f" that matches with `pip install --upgrade torchvision torch=={torch}`."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _pinned_torch(requirements: Sequence[str]) -> str | None:
    """Return the exact torch among requirements."""
    for requirement in requirements:
        if pinned := re.match(r"torch\s*\(?==\s*([\w.]+)", requirement):
            return pinned[1]
    return None
