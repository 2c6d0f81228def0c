"""The weights of a layer as numbers, whatever holds them: quantised, or with an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def dense_weight(linear: Any, width: int, like: Tensor) -> Tensor:
    """Return the weight of a linear layer in floating point: (outputs, width).

    Each library of quantisation and of adapters keeps it in a form of its own. They have the
    product in common, and that of the identity is the weight.

    Args:
        linear: The layer, whose weights are on a device.
        width: How many inputs it has.
        like: A tensor of the device and the precision that it computes in.
    """
    weight: Any = getattr(linear, "weight", None)
    rows = torch.eye(width, device=like.device, dtype=like.dtype)
    if isinstance(linear, nn.Linear) and weight.is_floating_point():
        if type(weight) is nn.Parameter:
            return weight.detach()
        return F.linear(rows, weight).T
    found: Tensor = linear(rows) - linear(torch.zeros_like(rows[:1]))
    return found.T


def is_alike(made: nn.Module, layer: nn.Module) -> bool:
    """Return whether a layer has all parts of another, in the same shapes.

    Args:
        made: A layer with plain weights.
        layer: One that may be quantised or adapted.
    """
    others = dict(layer.named_modules())
    for name, part in made.named_modules():
        other = others.get(name)
        if other is None:
            return False
        if isinstance(part, nn.Linear):
            # As many as it says; what says nothing is taken to fit.
            for size in ("in_features", "out_features"):
                if getattr(other, size, getattr(part, size)) != getattr(part, size):
                    return False
        elif any(_shape(other, key) != value.shape for key, value in _own(part)):
            return False
    return True


@torch.no_grad()
def copy_weights(made: nn.Module, layer: nn.Module) -> None:
    """Give a layer with plain weights those of another, which may be quantised or adapted.

    Args:
        made: The layer to change.
        layer: One that `is_alike`.
    """
    others: dict[str, Any] = dict(layer.named_modules())
    like = next(one for one in layer.parameters() if one.is_floating_point())
    for name, part in made.named_modules():
        for key, value in _own(part):
            if isinstance(part, nn.Linear) and key == "weight":
                value.copy_(dense_weight(others[name], part.in_features, like))
            else:
                value.copy_(getattr(others[name], key))


def _own(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own weights, those that are saved, by their names."""
    for key, value in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
        if key not in part._non_persistent_buffers_set:
            yield key, value


def _shape(part: Any, key: str) -> torch.Size | None:
    return getattr(getattr(part, key, None), "shape", None)
