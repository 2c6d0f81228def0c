"""Linear layers whose weights are laid out for products of a few rows, on a CPU in float32.

A verify multiplies every weight by as many rows as there are tokens in the draft. A plain matrix
product of 2 to 32 rows takes the CPU up to six times as long as the product of one row, of which
drafting has nothing left; with weights in oneDNN's own layout it takes hardly longer than reading
them once. Products of one row stay as they were, and so do all of them in autocast or while
gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.language.families import text_decoder

SMALLEST = 2**18
"""Weights of a matrix that is worth packing: of fewer, the call costs more than is saved."""
ROWS = 16
"""Rows of the products that the layout is made for."""
PACKED_BYTES = 4 * 2**30
"""Memory for packed weights: those of a decoder with a billion parameters."""


class PackedLinear(nn.Linear):
    """A linear layer that holds its weights twice: as they are, and packed.

    A layer becomes one by `pack`, and is an ordinary one again as soon as its weights are found to
    have changed or moved. Copies and pickles of it are ordinary ones too.
    """

    packed: Tensor
    packed_state: tuple[int, int]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as the base class has it
        """Return the product: (..., in_features) to (..., out_features)."""
        if (
            input.numel() == self.in_features
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        if _state(self.weight) != self.packed_state:
            _unpack(self)
            return self(input)
        return torch.ops.mkldnn._linear_pointwise.default(
            input, self.packed, self.bias, "none", [], ""
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the ordinary layer, whose weights are all there is to it."""
        del protocol
        state = {name: value for name, value in vars(self).items() if name not in PACKED}
        return _ordinary, (), state


PACKED = frozenset(PackedLinear.__annotations__)


def pack_decoder(model: PreTrainedModel, most_bytes: int = PACKED_BYTES) -> int:
    """Pack a model's decoder and LM head, as far as that pays on this machine and fits into memory.

    On an x86 CPU in float32, passes over a few positions are then faster, and so is every way of
    speculative decoding; elsewhere nothing is done. Parameters, state and gradients stay as they
    are. A layer whose weights change afterwards is an ordinary one again, but changes that are
    made through `weight.data` in place, as some libraries merge adapters, can't be seen: pack after
    them.

    Args:
        model: A causal, an encoder-decoder or a vision-language model of a family that is known.
        most_bytes: The most memory for packed weights, which are a second copy.

    Returns:
        The bytes that they take.
    """
    return pack([text_decoder(model), model.get_output_embeddings()], most_bytes)


def pack(modules: Iterable[nn.Module], most_bytes: int) -> int:
    """Pack the linear layers of some modules, as far as they gain from it and fit into memory.

    Those gain that are float32 on an x86 CPU, and large. Layers of other classes, such as quantised
    ones, and layers whose weights come and go, stay as they are.

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
    return ordinary and weight.numel() >= SMALLEST and not hasattr(layer, "_hf_hook")


def _pack(layer: nn.Linear) -> None:
    held: Any = layer
    held.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
    held.packed_state = _state(layer.weight)
    held.__class__ = PackedLinear


def _unpack(layer: PackedLinear) -> None:
    held: Any = layer
    for name in PACKED:
        delattr(held, name)
    held.__class__ = nn.Linear


def _ordinary() -> nn.Linear:
    return nn.Linear.__new__(nn.Linear)


def _state(weight: Tensor) -> tuple[int, int]:
    """Return what changes when weights are written to or replaced."""
    return weight._version, weight.data_ptr()
