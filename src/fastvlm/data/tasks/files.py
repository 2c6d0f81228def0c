"""Finding and reading what publishers put into a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvlm.functional.errors import InputError

_MAX_NAMES_IN_ERROR = 3


def find(folder: Path, *names: str) -> Path:
    """Return the first of some files that exists in a folder or in its `annotations`.

    Raises:
        InputError: None of them exists.
    """
    for name in names:
        for place in (folder / name, folder / "annotations" / name):
            if place.is_file():
                return place
    raise InputError(f"There is no {' or '.join(names)} in {folder}.")


def locate(folder: Path, places: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Return the path of each image.

    Args:
        folder: The folder that the candidates are relative to.
        places: Candidate paths of each image, by any name for it; the first that exists counts.

    Raises:
        InputError: Images are missing; it says how many and names the first few.
    """
    found: dict[str, Path] = {}
    missing = []
    for image, candidates in places.items():
        for candidate in candidates:
            if (folder / candidate).is_file():
                found[image] = folder / candidate
                break
        else:
            missing.append(candidates[0])
    if missing:
        named = ", ".join(missing[:_MAX_NAMES_IN_ERROR]) + (
            ", ..." if len(missing) > _MAX_NAMES_IN_ERROR else ""
        )
        raise InputError(f"{len(missing)} of {len(places)} images are missing in {folder}: {named}")
    return found
