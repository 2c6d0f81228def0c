"""Which families the installed release of `transformers` has."""

from __future__ import annotations

from typing import TypeVar

import transformers
from packaging.version import Version

RELEASE = Version(transformers.__version__)
MISSING = {
    "granite-docling": Version("5.23") > RELEASE,
    # Its `forward` reads `image_outputs`, which its decoder doesn't return: generate fails, too.
    "llama4": Version("5.24.0") == RELEASE,
}
"""Families that some releases don't have, or can't run; whether this is one of them."""

Made = TypeVar("Made")


def released(families: dict[str, Made]) -> dict[str, Made]:
    """Return those families that the installed release can run."""
    return {name: made for name, made in families.items() if not MISSING.get(name, False)}
