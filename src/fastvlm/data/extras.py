"""Optional packages that some data sets need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastvlm.functional.errors import InputError


def needed(package: str) -> Any:
    """Import and return an optional package.

    Raises:
        InputError: It is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise InputError(
            f"This data set needs {error.name or package}: pip install 'fastvlm[data]'."
        ) from error
