"""Weights out of a directory's files. Nothing in them is ever executed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastvlm.functional.errors import CheckpointError, first_line

NAMES = ("model.safetensors", "pytorch_model.bin")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a directory: safetensors or PyTorch's own files, whole or in shards.

    Raises:
        CheckpointError: There are none, a shard is missing or broken, or a file holds more than
            tensors.
    """
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _sharded(folder, index)
        if (folder / name).is_file():
            return _read(folder / name)
    raise CheckpointError(f"There are no weights in {folder}: neither {' nor '.join(NAMES)}.")


def _sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a list of shards: {error!r}.") from error
    weights: dict[str, Tensor] = {}
    for name in names:
        shard = folder / name
        if shard.parent != folder or not shard.is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is not in {folder}.")
        weights |= _read(shard)
    if missing := sorted(places.keys() - weights.keys()):
        raise CheckpointError(f"{index} lists {missing[0]}, but no shard holds it.")
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
