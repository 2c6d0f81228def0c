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
    """Return `model.to(...)`, the model itself, with its type.

    `PreTrainedModel.to` is wrapped in a way that hides its type, and the type of
    `torch.nn.Module.to` has no memory format.

    Args:
        model: The model, moved in place.
        places: A device, a precision, or both.
        memory_format: The memory format of parameters with four dimensions; None to keep it.
    """
    options = {} if memory_format is None else {"memory_format": memory_format}
    return cast(Any, model).to(*places, **options)
