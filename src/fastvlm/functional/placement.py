"""Moving a model to a device, a precision or a memory format, and models that lie on none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

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


@contextmanager
def on_no_device() -> Iterator[None]:
    """Make modules without weights: on the meta device, where initial values would be lost."""
    with torch.device("meta"), _NoInitialValues():
        yield


class _NoInitialValues(TorchFunctionMode):
    """Passes over `torch.nn.init`, in this thread alone; it takes as long as all else there is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)
