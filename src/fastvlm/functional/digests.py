"""Digests of data and weights, by which a resumed run recognises its own checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a value of plain types.

    Values of other types are identified by their `repr`, files by name and size, images by content.
    """
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        # By its name and size: the data may be moved, and reading all of it would take an hour.
        return [value.name, value.stat().st_size if value.is_file() else None]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Image.Image):
        return [value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    return repr(value)


def digest_of_weights(module: nn.Module) -> str:
    """Return a digest of a module's weights: their names, shapes and first values."""
    found = []
    for name, tensor in sorted(module.state_dict().items()):
        first = tensor.detach().flatten()[:16].double().cpu().tolist()
        found.append([name, list(tensor.shape), first])
    return digest(found)
