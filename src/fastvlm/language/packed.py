"""Linear layers whose weights are laid out once for the CPU, for products of any number of rows.

A step reads every weight for one row, and a verify multiplies every weight by as many rows as there
are tokens in the draft, which should take hardly longer than reading them once. Which layouts do
that is in `products`. Layers in autocast, or while gradients are recorded, compute as they did.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastvlm.language.products import Product, available, packs, product_of
from fastvlm.language.sampled import sampled
from fastvlm.language.structure import text_decoder

PACKED_BYTES = 4 * 2**30
"""Memory for packed weights: those of a decoder with two billion parameters in 16 bits."""
SAMPLED_WEIGHTS = 32
"""Weights of a matrix that are compared at each product: 1 to 5 microseconds."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight, and what tells whether it is still the layer's.

    Args:
        product: What multiplies by the weight, packed.
        weight: The parameter that was packed.
        version: Its version, which counts what is written to it.
        address: Where its values lie.
        sample: A strided view of some of its values, over all of its rows and columns.
        values: Those values as they were.
    """

    product: Product
    weight: Tensor
    version: int
    address: int
    sample: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, *, twice: bool = False) -> PackedWeight | None:
        """Pack a weight, (out_features, in_features); None where that doesn't pay.

        Args:
            weight: The parameter.
            twice: See `product_of`.
        """
        values = weight.detach()
        product = product_of(values, twice=twice)
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

    packed: PackedWeight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as the base class has it
        """Return the product: (..., in_features) to (..., out_features)."""
        # Another thread may make this layer an ordinary one at any time, of which `super()` and
        # `self.packed` know nothing.
        held: PackedWeight | None = vars(self).get("packed")
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


def pack_decoder(model: PreTrainedModel, most_bytes: int = PACKED_BYTES) -> int:
    """Pack a model's decoder and LM head, as far as that pays on this machine and fits into memory.

    On an x86 CPU every pass over one to a few tens of positions is then faster, and so is every way
    of decoding; elsewhere nothing is done. Parameters, state and gradients stay as they are, and
    products differ by rounding from those of plain weights.

    A layer whose weights change afterwards is an ordinary one again from its next call on, however
    they were changed: written to, replaced, or edited through `weight.data`, as PEFT merges
    adapters. What can't be noticed is an edit through `weight.data` that leaves most of a matrix as
    it was, such as of single weights or rows: write to the weight itself, under `torch.no_grad()`.

    Args:
        model: A causal, an encoder-decoder or a vision-language model of a family that is known.
        most_bytes: The most memory for packed weights, which are a second copy.

    Returns:
        The bytes that they take.
    """
    return pack([text_decoder(model), model.get_output_embeddings()], most_bytes)


def pack(modules: Iterable[nn.Module], most_bytes: int) -> int:
    """Pack the linear layers of some modules, as far as they gain from it and fit into memory.

    Those gain that are on an x86 CPU, contiguous, and large. Layers of other classes, such as
    quantised ones, and layers whose weights come and go, stay as they are.

    Args:
        modules: Whose linear layers; what is met again is passed over.
        most_bytes: The most memory for packed weights.

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
        packed = PackedWeight.of(layer.weight, twice=twice)
        if packed is not None and taken + packed.product.nbytes <= most_bytes:
            _pack(layer, packed)
            taken += packed.product.nbytes
    return taken


def may_pack(layer: nn.Linear) -> bool:
    """Return whether a layer holds its weights in a way that can be packed here."""
    weight = layer.weight
    plain = type(layer) is nn.Linear and type(weight) is nn.Parameter and not weight.is_inference()
    ordinary = plain and weight.device.type == "cpu" and packs(weight.dtype)
    return ordinary and weight.is_contiguous() and not hasattr(layer, "_hf_hook")


def _pack(layer: nn.Linear, packed: PackedWeight) -> None:
    held: Any = layer
    with _changing:
        held.packed = packed
        held.__class__ = PackedLinear


def _unpack(layer: PackedLinear, stale: PackedWeight) -> None:
    held: Any = layer
    with _changing:
        if vars(layer).get("packed") is stale:
            held.__class__ = nn.Linear
            del vars(layer)["packed"]


_changing = Lock()
"""Held while a layer becomes packed or ordinary."""


def _ordinary() -> nn.Linear:
    return nn.Linear.__new__(nn.Linear)
