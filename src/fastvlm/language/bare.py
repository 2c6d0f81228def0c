"""Modules that do what their class says, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_bare(module: Any) -> bool:
    """Return whether calling a module is running its class's `forward`, and nothing else."""
    own = vars(module)
    return "forward" not in own and not own["_forward_hooks"] and not own["_forward_pre_hooks"]


def is_lookup(embedding: Any) -> bool:
    """Return whether what embeds tokens looks rows of its weight up, and does nothing else."""
    return type(embedding) is nn.Embedding and embedding.max_norm is None and is_bare(embedding)
