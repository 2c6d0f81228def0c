"""Moving a model to a device, a precision or a memory format."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def moved(
    model: Model,
    *places: str | torch.device | torch.dtype,
    memory_format: torch.memory_format | None = None,
) -> Model:
    """Return `model.to(...)`, the model itself.

    `PreTrainedModel.to` is wrapped so that its type asks for the model a second time, and the type
    of `torch.nn.Module.to` knows no memory format.
    """
    options = {} if memory_format is None else {"memory_format": memory_format}
    return cast(Any, model).to(*places, **options)
