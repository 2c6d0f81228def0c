"""A graph of layers in ONNX Runtime, run on tensors of torch where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvlm.runtimes.attention_graph import PassKind
from fastvlm.runtimes.lent_rows import Lent
from fastvlm.runtimes.onnx_graph import MATRIX_AXES, OnnxGraph

KEPT_WIDTH = 32
"""Positions of the widest passes whose inputs and outputs stay bound from one to the next."""
TYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.bool: np.bool_,
}


class PassInputs(NamedTuple):
    """What layers are given beside hidden states.

    Args:
        starts: The first position of each row.
        rotations: Cosines and sines by the names `cos{n}` and `sin{n}`: those of the pass, (batch
            or 1, width, size), or, as always the same tables, of all positions: (capacity or more,
            size).
        lent: Where the layers read and write.
        masks: What is added to scores, by the names `mask{n}`, see `MaskedAttention`; none for
            other attention.
    """

    starts: Sequence[int]
    rotations: Mapping[str, Tensor]
    lent: Lent
    masks: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def by_position(self) -> bool:
        """Whether rotations are those of all positions."""
        return next(iter(self.rotations.values())).dim() == MATRIX_AXES

    @property
    def tables(self) -> tuple[int, ...]:
        """Where those lie."""
        return tuple(map(Tensor.data_ptr, self.rotations.values()))

    def rotations_of(self, width: int) -> Mapping[str, Tensor]:
        """Return the rotations of the pass, so many positions of each row."""
        if not self.by_position:
            return self.rotations
        places = torch.tensor(self.starts)[:, None] + torch.arange(width)
        return {name: table[places] for name, table in self.rotations.items()}


@dataclass(slots=True)
class _Bound:
    """Inputs and outputs of passes of one shape, bound for as long as they lie where they are.

    What each pass writes is held as it is written: calls of torch that are left out of a pass make
    a small model's noticeably shorter.
    """

    binding: Any
    inputs: dict[str, Tensor]
    rotations: dict[str, Tensor]
    """Where those of a pass are written: (batch, width, size) each."""
    outputs: list[Tensor]
    arrays: dict[str, Any]
    """The inputs of whole numbers, as arrays of NumPy."""
    memory: tuple[Any, ...] = ()
    """What stands for where keys, values and tables of all positions lie that are bound."""


class LayerPass:
    """A graph of layers, ready to run.

    Args:
        graph: One that `layers_graph` returned, or that begins as one.
        kind: What passes it is for.
        outputs: The sizes of what it makes, by name: (batch, width, size) each.
    """

    def __init__(self, graph: OnnxGraph, kind: PassKind, outputs: Mapping[str, int]) -> None:
        self.session, self._weights = graph.session()
        self.kind, self.outputs = kind, outputs
        self._bound: dict[tuple[int, int, int], _Bound] = {}
        self._tables: dict[str, Tensor] = {}
        """Of rotations, for passes of one row: (capacity or more, size)."""

    # What stays bound is written to in every mode, and only inference mode may do that.
    @torch.inference_mode()
    def run(self, x: Tensor | Sequence[Sequence[int]], given: PassInputs) -> list[Tensor]:
        """Run the layers; return the outputs.

        Args:
            x: Hidden states, (batch, width, d_model), or rows of tokens, as the graph takes them.
            given: The pass.
        """
        batch, width = len(x), len(x[0])
        capacity = given.lent.caches[0].shape[2]
        masked = self.kind == "masked"
        # The position after a single one is computed too, see `CausalAttention`.
        roomy = max(given.starts) + 2 <= capacity
        computed = 2 if width == 1 and roomy and not masked else width
        key = batch, width, computed
        bound = self._bound.get(key)
        if bound is None:
            states = x if isinstance(x, Tensor) else torch.tensor(x)
            bound = self._bind(states, computed, given)
            if width <= KEPT_WIDTH and not masked:
                self._bound[key] = bound
        self._bind_memory(bound, given, width)
        arrays = bound.arrays
        if isinstance(x, Tensor):
            bound.inputs["x"].copy_(x)
        else:
            arrays["x"][:] = x
        whole = self.kind == "single" and given.by_position
        if not whole:
            for name, values in given.rotations_of(width).items():
                bound.rotations[name].copy_(values)
        if self.kind == "single":
            first = given.starts[0] if whole else 0
            arrays["places"][:] = range(first, first + computed)
        if not masked:
            ends = [start + computed for start in given.starts]
            arrays["total"].flat = ends
            arrays["last"].flat = [end - 1 for end in ends]
        self.session.run_with_iobinding(bound.binding)
        return [output.clone() for output in bound.outputs]

    def _bind(self, x: Tensor, computed: int, given: PassInputs) -> _Bound:
        """Return inputs and outputs of passes of a shape, but for those of `_bind_memory`."""
        batch, width = x.shape[:2]
        masked = self.kind == "masked"
        inputs = _masked_inputs(given) if masked else _causal_inputs(batch, width, computed)
        if self.kind == "single":
            inputs["places"] = torch.zeros(1, computed, dtype=torch.long)
        elif not masked:
            inputs["direct"] = torch.tensor(batch == 1)
        states = x.is_floating_point()
        inputs["x"] = torch.empty(x.shape, dtype=torch.float32 if states else x.dtype)
        rotations = {}
        for name, values in given.rotations.items():
            if self.kind != "single":
                inputs[name] = values.new_zeros(batch, computed, values.shape[-1])
                rotations[name] = inputs[name][:, :width]
        binding = self.session.io_binding()
        for name, tensor in inputs.items():
            bind(binding.bind_input, name, tensor)
        outputs = []
        for name, size in self.outputs.items():
            outputs.append(torch.empty(batch, width, size))
            bind(binding.bind_output, name, outputs[-1])
        arrays = {name: one.numpy() for name, one in inputs.items() if not one.is_floating_point()}
        return _Bound(binding, inputs, rotations, outputs, arrays)

    def _bind_memory(self, bound: _Bound, given: PassInputs, width: int) -> None:
        """Bind keys and values as inputs, and the same memory as outputs; and tables as long."""
        caches, rows, where, _ = given.lent
        whole = self.kind == "single" and given.by_position
        memory = where, rows.start, rows.stop, *(given.tables if whole else ())
        if memory == bound.memory:
            return
        capacity = caches[0].shape[2]
        by_row = self.kind == "batched" and len(bound.inputs["x"]) > 1
        for number, cache in enumerate(caches):
            seen = cache[rows].unsqueeze(1) if by_row else cache[rows]
            bind(bound.binding.bind_input, f"cached{number}", seen)
            bind(bound.binding.bind_output, f"written{number}", seen)
        if whole:
            for name, values in given.rotations.items():
                bind(bound.binding.bind_input, name, values)
        elif self.kind == "single":
            for name, values in given.rotations.items():
                table = self._tables.get(name)
                if table is None or len(table) < capacity:
                    table = self._tables[name] = values.new_zeros(capacity, values.shape[-1])
                bind(bound.binding.bind_input, name, table)
                bound.rotations[name] = table[None, :width]
        bound.memory = memory


def _causal_inputs(batch: int, width: int, computed: int) -> dict[str, Tensor]:
    """Return what attention is given in passes of one shape, see `SingleAttention`."""
    whole = torch.arange(width)
    shape = (1,) if batch == 1 else (batch, 1)
    return {
        "rows": whole if computed == width else whole.new_zeros(computed),
        "kept": whole,
        "last": torch.zeros(shape, dtype=torch.int32),
        "total": torch.zeros(shape[:-1], dtype=torch.int32),
    }


def _masked_inputs(given: PassInputs) -> dict[str, Tensor]:
    """Return what `MaskedAttention` is given in a pass."""
    masks = given.masks
    end = next(iter(masks.values())).shape[-1]
    return {
        **{name: mask.contiguous() for name, mask in masks.items()},
        "starts": torch.tensor(given.starts),
        "end": torch.tensor([end]),
    }


def bind(how: Any, name: str, tensor: Tensor) -> None:
    """Bind a tensor where it lies, as an input or an output of a session."""
    how(name, "cpu", 0, TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
