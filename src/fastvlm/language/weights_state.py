"""What tells whether a decoder would still compute what it computed before."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastvlm.functional.sampled import sampled
from fastvlm.language.structure import text_decoder

VALUES_PER_WEIGHT = 4
"""Values of each weight that are compared."""
ADAPTER_FLAGS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""What PEFT's layers keep as plain attributes of what they compute."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of as many bytes as a value has: equal where all bits are, as no NaN is."""


@torch.no_grad()
def weights_state(model: Any) -> Hashable:
    """Return what changes whenever the weights, adapters or modules of a decoder change.

    The decoder's modules and those of the LM head count, with their parameters and persistent
    buffers, where these lie and how often they were written to, what PEFT's layers have switched
    on, and a few values of each weight: PEFT merges adapters through `weight.data`, which nothing
    else tells. It takes less than a millisecond for 300 parameters on a CPU; on another device the
    values come in one transfer, for which the device must have finished what it was given before.

    Not noticed are an edit through `weight.data` that leaves most of a matrix as it was, and edits
    of offloaded weights, which only visit the modules.

    Args:
        model: A causal, an encoder-decoder or a vision-language model of `transformers`, with
            adapters or without.

    Returns:
        What compares equal to another only while nothing changed, in this process.
    """
    modules: list[nn.Module] = []
    for root in (text_decoder(model), model.get_output_embeddings()):
        if root is not None:
            modules.append(root)
            _collect(root, modules)
    tensors: list[Tensor] = []
    for module in modules:
        if "_hf_hook" in vars(module) and _is_offloaded(module):
            continue
        tensors += [tensor for tensor in module._parameters.values() if tensor is not None]
        if module._buffers:
            tensors += _persistent_buffers(module)
    # A few kinds of modules, and hardly any with adapters: their attributes are looked up apart.
    adapted = {kind for kind in set(map(type, modules)) if hasattr(kind, "merged_adapters")}
    flags = tuple(adapter_flags(module) for module in modules if type(module) in adapted)
    identity = tuple(map(id, modules)), flags, identities(tensors)
    before = _samples.get(model)
    if before is None or before[0] != identity:
        before = _samples[model] = identity, _sample(tensors)
    return identity, tuple(_values(samples) for samples in before[1])


_samples: WeakKeyDictionary[nn.Module, tuple[Hashable, list[list[Tensor]]]] = WeakKeyDictionary()
"""The views of the values that were compared last, which take longer to make than to read."""


def adapter_flags(module: nn.Module) -> tuple[str, ...]:
    """Return which adapters of one of PEFT's layers act, and how much."""
    return tuple(repr(vars(module).get(name)) for name in ADAPTER_FLAGS)


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    """Append all modules inside a module; several times faster than `module.modules()`."""
    for child in list(module._modules.values()):
        if child is not None:
            found.append(child)
            _collect(child, found)


def _is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate fetches a module's weights for each pass, of any thread."""
    hook: Any = vars(module)["_hf_hook"]
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook]))


def _persistent_buffers(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's buffers but for tables that follow from the configuration.

    Some that quantise keep weights in buffers.
    """
    for name, tensor in list(module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield tensor


def identities(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Return what tells tensors from others, and whether they were written to."""
    try:
        found = [(id(one), one.data_ptr(), one._version, one.dtype, one.device) for one in tensors]
    except (RuntimeError, NotImplementedError):
        # Inference tensors count no versions, and some subclasses lie nowhere themselves.
        return tuple(map(_identity, tensors))
    # What lies nowhere may be made of parts that lie somewhere.
    return tuple(found) if all(one[1] for one in found) else tuple(map(_identity, tensors))


def _identity(tensor: Tensor) -> tuple[Hashable, ...]:
    version = None if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.dtype, tensor.device, *map(_address, plain_parts(tensor))


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None


def plain_parts(tensor: Any) -> Iterator[Tensor]:
    """Yield a tensor, or those that a tensor subclass, such as a quantised one, is made of."""
    if type(tensor) in {nn.Parameter, Tensor}:
        yield tensor
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor


def _sample(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return views of a few values of each tensor, together by device and type."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        for part in plain_parts(tensor):
            if (view := _values_of(part)) is not None:
                found.setdefault((view.device, view.dtype), []).append(view)
    return list(found.values())


def _values_of(tensor: Tensor) -> Tensor | None:
    """Return a view of a few values; None where they can't be read."""
    if tensor.is_meta or tensor.dtype.itemsize not in BITS:
        return None
    try:
        turned = tensor if tensor.is_contiguous() else tensor.mT
        return sampled(turned, VALUES_PER_WEIGHT) if turned.is_contiguous() else None
    except (RuntimeError, NotImplementedError):  # a subclass that knows no strides
        return None


def _values(samples: list[Tensor]) -> tuple[int, ...]:
    """Return the bits of values of one device and type, in one transfer."""
    joined = torch.cat(samples)
    return tuple(joined.view(BITS[joined.dtype.itemsize]).tolist())
