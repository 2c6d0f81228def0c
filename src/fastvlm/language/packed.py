"""Linear layers whose weights are laid out for products of a few rows, on a CPU in float32.

A verify multiplies every weight by as many rows as there are tokens in the draft. A plain matrix
product of 2 to 32 rows takes the CPU up to six times as long as the product of one row, of which
drafting has nothing left; with weights in oneDNN's own layout it takes hardly longer than reading
them once. Products of one row stay as they were, and so do all of them in autocast or while
gradients are recorded.
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

from fastvlm.language.sampled import sampled
from fastvlm.language.structure import text_decoder

SMALLEST = 2**18
"""Weights of a matrix that is worth packing: of fewer, the call costs more than is saved."""
ROWS = 16
"""Rows of the products that the layout is made for."""
PACKED_BYTES = 4 * 2**30
"""Memory for packed weights: those of a decoder with a billion parameters."""
SAMPLED_WEIGHTS = 32
"""Weights of a matrix that are compared at each product: 1 to 5 microseconds."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in oneDNN's layout, and what tells whether it is still the layer's.

    Args:
        packed: The weight, packed.
        weight: The parameter that was packed.
        version: Its version, which counts what is written to it.
        address: Where its values lie.
        sample: A strided view of some of its values, over all of its rows and columns.
        values: Those values as they were.
    """

    packed: Tensor
    weight: Tensor
    version: int
    address: int
    sample: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight:
        """Pack a weight: (out_features, in_features)."""
        values = weight.detach()
        sample = sampled(values, SAMPLED_WEIGHTS)
        return cls(
            torch.ops.mkldnn._reorder_linear_weight(values, ROWS),
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
        weight, bias = self.weight, self.bias
        if (
            held is None
            or input.numel() == self.in_features
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return F.linear(input, weight, bias)
        if not held.is_of(weight):
            _unpack(self, held)
            return F.linear(input, weight, bias)
        return torch.ops.mkldnn._linear_pointwise.default(input, held.packed, bias, "none", [], "")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the ordinary layer, whose weights are all there is to it."""
        del protocol
        state = vars(self).copy()
        state.pop("packed", None)
        return _ordinary, (), state


def pack_decoder(model: PreTrainedModel, most_bytes: int = PACKED_BYTES) -> int:
    """Pack a model's decoder and LM head, as far as that pays on this machine and fits into memory.

    On an x86 CPU in float32, passes over a few positions are then faster, and so is every way of
    speculative decoding; elsewhere nothing is done. Parameters, state and gradients stay as they
    are.

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

    Those gain that are float32 on an x86 CPU, contiguous, and large. Layers of other classes, such
    as quantised ones, and layers whose weights come and go, stay as they are.

    Args:
        modules: Whose linear layers; what is met again is passed over.
        most_bytes: The most memory for packed weights.

    Returns:
        The bytes that they take.
    """
    taken = 0
    if not available():
        return taken
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, nn.Linear) and gains(layer):
            size = layer.weight.nbytes
            if taken + size <= most_bytes:
                _pack(layer)
                taken += size
    return taken


def available() -> bool:
    """Return whether this CPU and this torch pack weights."""
    capability = torch.backends.cpu.get_cpu_capability()
    return torch.backends.mkldnn.is_available() and capability.startswith("AVX")


def gains(layer: nn.Linear) -> bool:
    """Return whether a layer's products of a few rows are faster with packed weights."""
    weight = layer.weight
    plain = type(layer) is nn.Linear and type(weight) is nn.Parameter and not weight.is_inference()
    ordinary = plain and weight.device.type == "cpu" and weight.dtype == torch.float32
    large = ordinary and weight.numel() >= SMALLEST and weight.is_contiguous()
    return large and not hasattr(layer, "_hf_hook")


def _pack(layer: nn.Linear) -> None:
    held: Any = layer
    packed = PackedWeight.of(layer.weight)
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
