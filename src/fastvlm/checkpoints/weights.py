"""Reading weights from files, without executing anything in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastvlm.checkpoints.files import weight_files
from fastvlm.functional.errors import CheckpointError, first_line
from fastvlm.functional.model_files import check_weight_file

MAX_NAMES_IN_ERROR = 3
"""The maximum number of wrong weights that an error names."""
LAYER_COUNT_PATTERN = re.compile(r"layers?$|^depths?$|^n_layer$")
"""Names of settings that count layers."""
MAX_LAYERS = 4096


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a directory, memory-mapped where possible.

    Args:
        folder: Has safetensors or PyTorch's own files, whole or in shards.

    Raises:
        CheckpointError: There are none, a shard is missing or broken, or a file holds more than
            tensors.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        check_weight_file(file)
        weights |= _read(file)
    return weights


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{file} can't be read: {first_line(error)}.") from error
    except Exception as error:  # what `weights_only` refuses is a pickle's own error
        raise CheckpointError(
            f"{file} holds more than weights, and is not executed: {first_line(error)}."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(w, Tensor) for w in loaded.values()):
        raise CheckpointError(f"{file} is not a dictionary of weights.")
    return loaded


def named(names: Sequence[str]) -> str:
    """Return the first few names of a list, and the number of the others, as text."""
    rest = len(names) - MAX_NAMES_IN_ERROR
    return ", ".join(names[:MAX_NAMES_IN_ERROR]) + (f" and {rest} more" if rest > 0 else "")


def be(names: Sequence[str]) -> str:
    """Return the verb for a list of names, `is` or `are`."""
    return "is" if len(names) == 1 else "are"


def by(shape: Sequence[int]) -> str:
    """Return a shape in words, such as "3 x 64 x 64"."""
    return " x ".join(map(str, shape)) or "a single number"


def misshapen(name: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    """Return a weight's name with the shape found and the shape expected."""
    return f"{name} ({by(found)}, not {by(wanted)})"


def refuse_wrong(place: Any, problems: dict[str, Sequence[str]]) -> None:
    """Refuse weights that don't fit their configuration.

    Args:
        place: Where the weights are, for the error message.
        problems: The names of the wrong weights, by what is wrong with them.

    Raises:
        CheckpointError: There is a wrong weight; it names the first few.
    """
    said = [f"{named(names)} {be(names)} {what}" for what, names in problems.items() if names]
    if said:
        raise CheckpointError(
            f"The weights in {place} are not those of its config.json: {'; '.join(said)}."
        )


def check_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration with so many layers that building its model would never end.

    Args:
        folder: The model's folder, for the error message.
        config: The contents of `config.json`.

    Raises:
        CheckpointError: A number of layers exceeds `MAX_LAYERS`.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_layers(folder, value)
        elif (
            LAYER_COUNT_PATTERN.search(name)
            and isinstance(value, int | float)
            and value > MAX_LAYERS
        ):
            raise CheckpointError(
                f"{folder / 'config.json'} has {name} {value:g}; at most {MAX_LAYERS:,} make sense."
            )
