"""Data sets small enough to write by hand, laid out as their publishers lay them out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Make files in the place of images, which loaders never open."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
