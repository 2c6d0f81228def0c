"""Linear layers whose weights are laid out once for the CPU, for products of any number of rows.

A step reads every weight for one row, and a verify multiplies every weight by as many rows as there
are tokens in the draft, which should take hardly longer than reading them once. Which layouts do
that is in `products`. Layers in autocast, or while gradients are recorded, compute as they did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.functional.products import Product, available, packs, product_of
from fastvlm.functional.sampled import sampled

SAMPLED_WEIGHTS = 32
"""Weights of a matrix that are compared at each product: 1 to 5 microseconds."""


P_co = TypeVar("P_co", bound=Product, covariant=True)


@dataclass(frozen=True, slots=True)
class PackedWeight(Generic[P_co]):
    """A packed weight, and what tells whether it is still the layer's.

    Args:
        product: What multiplies by the weight, packed.
        weight: The parameter that was packed.
        version: Its version, which counts what is written to it.
        address: Where its values lie.
        sample: A strided view of some of its values, over all of its rows and columns.
        values: Those values as they were.
    """

    product: P_co
    weight: Tensor
    version: int
    address: int
    sample: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, pack: Callable[[Tensor], P_co | None]) -> PackedWeight[P_co] | None:
        """Pack a weight; None where that doesn't pay.

        Args:
            weight: The parameter: (out_features, in_features), or that of a 1x1 convolution.
            pack: What packs it, see `product_of`.
        """
        values = weight.detach().flatten(1)
        product = pack(values)
        if product is None:
            return None
        sample = sampled(values, SAMPLED_WEIGHTS)
        return cls(
            product,
            weight,
            weight._version,
            weight.data_ptr(),
            sample,
            sample.clone(),
        )

    def is_of(self, weight: Tensor) -> bool:
        """Return whether a weight is the one that was packed, and unchanged as far as can be told.

        Its version tells what is written to it and its address what replaces it. Neither tells
        what is written through `weight.data`, as PEFT merges adapters: the sampled values do.
        """
        return (
            weight is self.weight
            and weight._version == self.version
            and weight.data_ptr() == self.address
            and torch.equal(self.sample, self.values)
        )


class PackedLinear(nn.Linear):
    """A linear layer that holds its weights twice: as they are, and packed.

    A layer becomes one by `pack`, and is an ordinary one again as soon as its weights are found to
    have changed or moved. Copies and pickles of it are ordinary ones too. Any number of threads may
    call it while that happens.
    """

    packed: PackedWeight[Product]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as the base class has it
        """Return the product: (..., in_features) to (..., out_features)."""
        # Another thread may make this layer an ordinary one at any time, of which `super()` and
        # `self.packed` know nothing.
        held: PackedWeight[Product] | None = vars(self).get("packed")
        # Found here at once: looking them up as attributes takes as long as a small operator.
        parameters = self._parameters
        own = "weight" in parameters and "bias" in parameters
        weight: Any = parameters["weight"] if own else self.weight
        bias = parameters["bias"] if own else self.bias
        if held is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, bias)
        if not held.is_of(weight):
            _unpack(self, held)
            return F.linear(input, weight, bias)
        return held.product(input, weight, bias)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the ordinary layer, whose weights are all there is to it."""
        del protocol
        state = vars(self).copy()
        state.pop("packed", None)
        return _ordinary, (), state


def pack(
    modules: Iterable[nn.Module],
    most_bytes: int,
    how: Callable[[Tensor], Product | None] | None = None,
) -> int:
    """Pack the linear layers of some modules, as far as they gain from it and fit into memory.

    Those gain that are on an x86 CPU, contiguous, and large. Layers of other classes, such as
    quantised ones, and layers whose weights come and go, stay as they are.

    Args:
        modules: Whose linear layers; what is met again is passed over.
        most_bytes: The most memory for packed weights.
        how: What packs a weight; None for `product_of`.

    Returns:
        The bytes that they take.
    """
    taken = 0
    if not available():
        return taken
    parts = (part for module in modules for part in module.modules())
    found = (part for part in parts if isinstance(part, nn.Linear) and may_pack(part))
    layers = list(dict.fromkeys(found))
    # Rather every layer once than some of them twice.
    twice = 2 * sum(layer.weight.nbytes for layer in layers) <= most_bytes
    for layer in layers:
        # No packed weight takes less than 2 bytes.
        if taken + 2 * layer.weight.numel() > most_bytes:
            continue
        packed = PackedWeight.of(layer.weight, how or partial(product_of, twice=twice))
        if packed is not None and taken + packed.product.nbytes <= most_bytes:
            _pack(layer, packed)
            taken += packed.product.nbytes
    return taken


def may_pack(layer: nn.Linear) -> bool:
    """Return whether a layer holds its weights in a way that can be packed here."""
    ordinary = type(layer) is nn.Linear and layer.weight.is_contiguous()
    return ordinary and may_pack_weight(layer.weight) and not hasattr(layer, "_hf_hook")


def may_pack_weight(weight: Tensor) -> bool:
    """Return whether a weight can be packed here, if its values lie side by side."""
    plain = type(weight) is nn.Parameter and not weight.is_inference()
    return plain and weight.device.type == "cpu" and packs(weight.dtype)


def _pack(layer: nn.Linear, packed: PackedWeight[Product]) -> None:
    held: Any = layer
    with _changing:
        held.packed = packed
        held.__class__ = PackedLinear


def _unpack(layer: PackedLinear, stale: PackedWeight[Product]) -> None:
    held: Any = layer
    with _changing:
        if vars(layer).get("packed") is stale:
            held.__class__ = nn.Linear
            del vars(layer)["packed"]


_changing = Lock()
"""Held while a layer becomes packed or ordinary."""


def _ordinary() -> nn.Linear:
    return nn.Linear.__new__(nn.Linear)
