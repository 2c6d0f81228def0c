"""A graph of layers in ONNX Runtime, run on tensors of torch where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvlm.runtimes.attention_graph import PassKind
from fastvlm.runtimes.onnx_graph import OnnxGraph

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
        rotations: Cosines and sines by the names `cos{n}` and `sin{n}`: (batch or 1, width, size).
        caches: Keys and values of each layer by turns, contiguous: (slots, kv_heads, capacity,
            head_dim).
        rows: The slots of the pass.
        masks: What is added to scores, by the names `mask{n}`, see `MaskedAttention`; none for
            other attention.
    """

    starts: Sequence[int]
    rotations: Mapping[str, Tensor]
    caches: Sequence[Tensor]
    rows: slice
    masks: Mapping[str, Tensor] = MappingProxyType({})


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
    last: Any
    total: Any
    """Those of the inputs, as arrays of NumPy: (batch,) each. None with masks."""
    memory: tuple[int, ...] = field(default=())
    """Where keys and values lie that are bound, and their capacity."""


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
    def run(self, x: Tensor, given: PassInputs) -> list[Tensor]:
        """Run the layers on hidden states, (batch, width, d_model); return the outputs."""
        batch, width, _ = x.shape
        capacity = given.caches[0].shape[2]
        masked = self.kind == "masked"
        # The position after a single one is computed too, see `CausalAttention`.
        roomy = max(given.starts) + 2 <= capacity
        computed = 2 if width == 1 and roomy and not masked else width
        key = batch, width, computed
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bind(x, computed, given)
            if width <= KEPT_WIDTH and not masked:
                self._bound[key] = bound
        self._bind_memory(bound, given, width)
        bound.inputs["x"].copy_(x)
        for name, values in given.rotations.items():
            bound.rotations[name].copy_(values)
        if not masked:
            ends = [start + computed for start in given.starts]
            bound.total[:] = ends
            bound.last[:] = [end - 1 for end in ends]
        self.session.run_with_iobinding(bound.binding)
        return [output.clone() for output in bound.outputs]

    def _bind(self, x: Tensor, computed: int, given: PassInputs) -> _Bound:
        """Return inputs and outputs of passes of a shape, but for those of `_bind_memory`."""
        batch, width, _ = x.shape
        masked = self.kind == "masked"
        inputs = _masked_inputs(x, given) if masked else _causal_inputs(x, computed)
        if self.kind == "single":
            inputs["places"] = torch.arange(computed)[None]
        elif not masked:
            inputs["direct"] = torch.tensor(batch == 1)
        inputs["x"] = torch.empty_like(x, memory_format=torch.contiguous_format)
        rotations = {}
        for name, values in given.rotations.items():
            if self.kind != "single":
                inputs[name] = x.new_zeros(batch, computed, values.shape[-1])
                rotations[name] = inputs[name][:, :width]
        binding = self.session.io_binding()
        for name, tensor in inputs.items():
            bind(binding.bind_input, name, tensor)
        outputs = []
        for name, size in self.outputs.items():
            outputs.append(x.new_empty(batch, width, size))
            bind(binding.bind_output, name, outputs[-1])
        last, total = (
            None if masked else inputs[name].numpy().reshape(-1) for name in ("last", "total")
        )
        return _Bound(binding, inputs, rotations, outputs, last, total)

    def _bind_memory(self, bound: _Bound, given: PassInputs, width: int) -> None:
        """Bind keys and values as inputs, and the same memory as outputs; and tables as long."""
        rows, caches = given.rows, given.caches
        capacity = caches[0].shape[2]
        memory = (rows.start, rows.stop, capacity, *map(Tensor.data_ptr, caches))
        if memory == bound.memory:
            return
        by_row = self.kind == "batched" and len(bound.inputs["x"]) > 1
        for number, cache in enumerate(caches):
            seen = cache[rows].unsqueeze(1) if by_row else cache[rows]
            bind(bound.binding.bind_input, f"cached{number}", seen)
            bind(bound.binding.bind_output, f"written{number}", seen)
        if self.kind == "single":
            for name, values in given.rotations.items():
                table = self._tables.get(name)
                if table is None or len(table) < capacity:
                    table = self._tables[name] = values.new_zeros(capacity, values.shape[-1])
                bind(bound.binding.bind_input, name, table)
                bound.rotations[name] = table[None, :width]
        bound.memory = memory


class HeadPass:
    """A graph from hidden states, `x`, to logits, `y`.

    Args:
        graph: The graph.
        size: Logits that it makes.
    """

    def __init__(self, graph: OnnxGraph, size: int) -> None:
        self.session, self._weights = graph.session()
        self.size = size

    @torch.inference_mode()
    def run(self, x: Tensor) -> Tensor:
        """Return the logits: (..., d_model) to (..., size)."""
        flat = x.reshape(1, -1, x.shape[-1]).contiguous()
        found = x.new_empty(*x.shape[:-1], self.size)
        binding = self.session.io_binding()
        bind(binding.bind_input, "x", flat)
        bind(binding.bind_output, "y", found.view(1, -1, self.size))
        self.session.run_with_iobinding(binding)
        return found


def _causal_inputs(x: Tensor, computed: int) -> dict[str, Tensor]:
    """Return what attention is given in passes of one shape, see `SingleAttention`."""
    batch, width, _ = x.shape
    whole = torch.arange(width)
    shape = (1,) if batch == 1 else (batch, 1)
    return {
        "rows": whole if computed == width else whole.new_zeros(computed),
        "kept": whole,
        "last": torch.zeros(shape, dtype=torch.int32),
        "total": torch.zeros(shape[:-1], dtype=torch.int32),
    }


def _masked_inputs(x: Tensor, given: PassInputs) -> dict[str, Tensor]:
    """Return what `MaskedAttention` is given in a pass."""
    masks = given.masks
    end = next(iter(masks.values())).shape[-1]
    return {
        **{name: mask.to(x.dtype).contiguous() for name, mask in masks.items()},
        "starts": torch.tensor(given.starts),
        "end": torch.tensor([end]),
    }


def bind(how: Any, name: str, tensor: Tensor) -> None:
    """Bind a tensor where it lies, as an input or an output of a session."""
    how(name, "cpu", 0, TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
