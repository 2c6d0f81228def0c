"""Checks of model files, for clearer errors than a library's own."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastvlm.functional.errors import CheckpointError, first_line

FILE_SIGNATURES = {
    b"version https://git-lfs": (
        "is a Git LFS pointer and not the file itself; fetch it with git lfs pull"
    ),
    b"GGUF": "is a GGUF file of llama.cpp's",
    b"\x89HDF": "is an HDF5 file of TensorFlow's",
    b"\x1f\x8b": "is compressed with gzip",
    b"<": "is an HTML or XML page, perhaps of a download that failed",
}
"""Kinds of wrong files, by their first bytes."""
MIN_EXCESS_PARAMETERS = 1_000_000
"""The minimum excess of parameters for which a model's size is refused."""
MAX_HEADER_BYTES = 100_000_000
"""The maximum size of a safetensors header, in bytes."""


def oddity(file: Path) -> str | None:
    """Return what is wrong with a file's contents, given its name; None if nothing is apparent.

    The answer continues a sentence that begins with the file's name: "is empty".
    """
    try:
        with file.open("rb") as content:
            head = content.read(64)
    except OSError as error:
        return f"can't be read: {error.strerror or first_line(error)}"
    if not head:
        return "is empty"
    if not any(head):
        return "holds zeros alone, as after a download that was cut off"
    return next(
        (what for start, what in FILE_SIGNATURES.items() if head.lstrip().startswith(start)), None
    )


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: It can't be read, is not JSON, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} {oddity(file) or f'is not valid JSON: {first_line(error)}'}."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a JSON {type(found).__name__}, not an object.")
    return found


def check_weight_file(file: Path) -> None:
    """Refuse a file of weights that is truncated, empty or of another kind.

    Raises:
        CheckpointError: It is; it names the file.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file.")
    if (what := oddity(file)) is not None:
        raise CheckpointError(f"{file} {what}.")
    if file.suffix == ".safetensors":
        _check_safetensors(file)
    elif not zipfile.is_zipfile(file) and file.read_bytes()[:1] != b"\x80":
        raise CheckpointError(f"{file} is no file of PyTorch's weights, or its end is missing.")


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{file} is no file of safetensors, or its end is missing.")
        header = content.read(length)
    try:
        tensors = json.loads(header)
        ends = [
            int(entry["data_offsets"][1])
            for name, entry in tensors.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a broken header: {first_line(error)}.") from error
    missing = 8 + length + max(ends, default=0) - size
    if missing > 0:
        raise CheckpointError(f"{file} is cut off: {missing:,} bytes are missing at its end.")
    if missing < 0:
        raise CheckpointError(f"{file} has {-missing:,} bytes more than its header tells of.")


def check_size(config: Path, files: Sequence[Path], model: nn.Module) -> None:
    """Refuse a configuration whose model is far larger than the weights beside it.

    Loading it would fill the memory with random weights before the mismatch is found.

    Args:
        config: The configuration file.
        files: The files of weights.
        model: The model of that configuration, on the meta device.

    Raises:
        CheckpointError: The model is too large.
    """
    stored = sum(file.stat().st_size for file in files)
    # No format has less than half a byte a parameter, and none is quantised here.
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > MIN_EXCESS_PARAMETERS + 2 * stored:
        raise CheckpointError(
            f"{config} describes a model of {described:,} parameters, and there are {stored:,}"
            " bytes of weights."
        )
