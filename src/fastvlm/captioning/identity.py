"""Which model a run's captions are from, told without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastvlm.example import example

MAX_READ_BYTES = 2**20
"""The most bytes of a file that are read: of larger ones, those in its middle."""


def model_identity(model: str | None) -> str:
    """Return what tells a model from others.

    Args:
        model: A directory, of whose files the names, the sizes and (of large ones in part) the
            contents tell; a name on the Hugging Face hub; None for the example model.
    """
    folder = Path(example().MODEL) if model is None else Path(model)
    if not folder.is_dir():
        return str(model)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}\n".encode())
            if size <= MAX_READ_BYTES:
                digest.update(file.read_bytes())
            else:
                with file.open("rb") as content:
                    content.seek(size // 2)
                    digest.update(content.read(MAX_READ_BYTES))
    return digest.hexdigest()
