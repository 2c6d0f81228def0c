"""Weights: safetensors and PyTorch's own files, whole and in shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from tests.fuzzing.areas.loaded import LoadedModels
from tests.fuzzing.models import FASTVITHD


class Checkpoints(LoadedModels):
    """See `Area`."""

    name: ClassVar[str] = "checkpoints"
    share: ClassVar[float] = 0.04
    models: ClassVar[Sequence[str]] = (FASTVITHD, "llama", "llava", "smolvlm")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shard(self.saved["smolvlm"])
        whole = self.saved["llama"]
        torch.save(load_file(whole / "model.safetensors"), whole / "pytorch_model.bin")
        (whole / "model.safetensors").unlink()

    def names(self, model: str) -> list[str]:
        """Return the files of weights."""
        kinds = (".safetensors", ".bin", ".index.json")
        return sorted(
            file.name for file in self.saved[model].iterdir() if file.name.endswith(kinds)
        )


def shard(folder: Path) -> None:
    """Cut a model's weights into shards."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(weights, folder, max_shard_size="60KB")
