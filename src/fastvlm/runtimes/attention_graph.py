"""Attention in a graph for ONNX Runtime, which writes keys and values where the cache keeps them.

A pass computes `width` positions in each of its rows, from a start of each row's own. Its numbers
depend on neither the width nor the rows beside: products with weights round each row alike, and
attention, whose products of one row would round otherwise, computes each row of the batch by
itself, two positions or more. So a verify gives the logits of ordinary decoding to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from onnx import TensorProto, helper

from fastvlm.language.masks import MaskKind
from fastvlm.runtimes.layer_form import AttentionForm
from fastvlm.runtimes.onnx_graph import CONTRIBUTED, OnnxGraph

Heads = tuple[str, str, str]
"""Queries, keys and values, rotated: (batch, computed, heads * head_dim) each."""


class Attention(Protocol):
    """Attention of a graph's layers."""

    def enter(self, qkv: str) -> str:
        """Return queries, keys and values at the positions that attention computes."""
        ...

    def attend(self, form: AttentionForm, mask: MaskKind, heads: Heads) -> str:
        """Return the heads' outputs: (batch, width, heads * head_dim)."""
        ...


class CausalAttention:
    """Attention to all positions up to a row's own, or to a window of them.

    A pass of one position computes the next one too, of which nothing is kept: what it writes there
    is overwritten before it is read. Inputs of a pass:

        direct: Whether it has one row.
        rows: The positions that attention computes: (computed,), 0 twice for a pass of one.
        kept: Those of them that count: (width,).
        last: The last position that it computes in each row: (1,) of one row, else (batch, 1).
        total: How many positions each row has then: () of one row, else (batch,).
        cached{n}: Keys of layer n / 2, and values with an odd number: (1, kv_heads, capacity,
            head_dim) of one row, else (batch, 1, kv_heads, capacity, head_dim). `written{n}` is the
            same memory.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph, self.cached = graph, 0
        graph.input("direct", TensorProto.BOOL, [])
        graph.input("rows", TensorProto.INT64, ["computed"])
        graph.input("kept", TensorProto.INT64, ["width"])
        graph.input("last", TensorProto.INT32, None)
        graph.input("total", TensorProto.INT32, None)

    def enter(self, qkv: str) -> str:
        """Return queries, keys and values at the positions that attention computes."""
        found: str = self.graph.add("Gather", [qkv, "rows"], axis=1)
        return found

    def attend(self, form: AttentionForm, mask: MaskKind, heads: Heads) -> str:
        """Return the heads' outputs: (batch, width, heads * head_dim)."""
        graph = self.graph
        cached, written = _declare_cache(graph, self.cached, None)
        given: dict[str, Any] = {
            "num_heads": form.heads,
            "kv_num_heads": form.kv_heads,
            "scale": form.scale,
            "softcap": form.softcap,
            "local_window_size": mask.window or -1,
        }

        def attention(inputs: Sequence[str], outputs: Sequence[str]) -> Any:
            return helper.make_node(
                "GroupQueryAttention", inputs, outputs, domain=CONTRIBUTED, **given
            )

        inputs = [*heads, *cached, "last", "total"]
        name = f"attention{self.cached}"
        outputs = [f"{name}_direct{index}" for index in range(3)]
        one_row = graph.branch(f"{name}_one", [attention(inputs, outputs)], outputs)
        rows = self._row_by_row(name, inputs, attention)
        attended = f"{name}_heads"
        made = [attended, *written]
        graph.add("If", ["direct"], made, then_branch=one_row, else_branch=rows)
        self.cached += 2
        found: str = graph.add("Gather", [attended, "kept"], axis=1)
        return found

    def _row_by_row(self, name: str, inputs: Sequence[str], attention: Any) -> Any:
        """Return a graph of the rows of a batch one after another, each a slice of all inputs."""
        inner = [f"{name}_row{index}" for index in range(len(inputs))]
        each = [f"{name}_made{index}" for index in range(3)]
        types = [TensorProto.FLOAT] * 5 + [TensorProto.INT32] * 2
        body = helper.make_graph(
            [attention(inner, each)],
            f"{name}_row",
            [helper.make_tensor_value_info(*pair, None) for pair in zip(inner, types, strict=True)],
            [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in each],
        )
        graph = self.graph
        axis = graph.constant(1)
        own = [f"{name}_own{index}" for index in range(3)]
        nodes = [
            helper.make_node("Unsqueeze", [one, axis], [made])
            for one, made in zip(inputs[:3], own, strict=True)
        ]
        outputs = [f"{name}_rows{index}" for index in range(3)]
        stacked = f"{name}_stacked"
        scanned = [stacked, *outputs[1:]]
        given = [*own, *inputs[3:]]
        nodes.append(
            helper.make_node("Scan", given, scanned, body=body, num_scan_inputs=len(given))
        )
        nodes.append(helper.make_node("Squeeze", [stacked, axis], outputs[:1]))
        return graph.branch(f"{name}_rows", nodes, outputs)


class MaskedAttention:
    """Attention to the positions that a pass says.

    Inputs of a pass:

        mask{n}: What is added to the scores of layers of the n-th kind: (batch or 1, 1, 1, width,
            end).
        starts: The first position of each row: (batch,).
        end: How many positions are read: (1,).
        cached{n}: See `CausalAttention`; (batch, kv_heads, capacity, head_dim).

    Args:
        graph: The graph.
        kinds: What the layers see, without repetitions.
    """

    def __init__(self, graph: OnnxGraph, kinds: Sequence[MaskKind]) -> None:
        self.graph, self.kinds, self.cached = graph, list(kinds), 0
        for index in range(len(kinds)):
            shape: list[str | int] = ["rows", 1, 1, "width", "end"]
            graph.input(f"mask{index}", TensorProto.FLOAT, shape)
        graph.input("starts", TensorProto.INT64, ["batch"])
        graph.input("end", TensorProto.INT64, [1])

    def enter(self, qkv: str) -> str:
        """Return queries, keys and values as they are."""
        return qkv

    def attend(self, form: AttentionForm, mask: MaskKind, heads: Heads) -> str:
        """Return the heads' outputs: (batch, width, heads * head_dim)."""
        graph, size = self.graph, form.head_dim
        shape: list[str | int] = ["batch", form.kv_heads, "capacity", size]
        cached, written = _declare_cache(graph, self.cached, shape)
        read = []
        for new, old, out in zip(heads[1:], cached, written, strict=True):
            split = graph.add("Reshape", [new, graph.constant(0, 0, form.kv_heads, size)])
            by_head = graph.add("Transpose", [split], perm=[0, 2, 1, 3])
            whole = graph.add("TensorScatter", [old, by_head, "starts"], [out], axis=2)
            until = graph.add("Slice", [whole, graph.constant(0), "end", graph.constant(2)])
            read.append(graph.add("Unsqueeze", [until, graph.constant(2)]))
        grouped = graph.constant(0, 0, form.kv_heads, form.heads // form.kv_heads, size)
        queries = graph.add("Reshape", [heads[0], grouped])
        queries = graph.add("Transpose", [queries], perm=[0, 2, 3, 1, 4])
        scores = graph.add("FusedMatMul", [queries, read[0]], transB=1, alpha=form.scale)
        if form.softcap:
            cap = graph.add("Div", [scores, graph.scalar(form.softcap)])
            scores = graph.add("Mul", [graph.add("Tanh", [cap]), graph.scalar(form.softcap)])
        scores = graph.add("Add", [scores, f"mask{self.kinds.index(mask)}"])
        attended = graph.add("MatMul", [graph.add("Softmax", [scores], axis=-1), read[1]])
        attended = graph.add("Transpose", [attended], perm=[0, 3, 1, 2, 4])
        self.cached += 2
        found: str = graph.add("Reshape", [attended, graph.constant(0, 0, -1)])
        return found


def _declare_cache(
    graph: OnnxGraph, first: int, shape: Sequence[str | int] | None
) -> tuple[list[str], list[str]]:
    """Declare a layer's keys and values as inputs and outputs; return the names of both."""
    cached, written = [], []
    for number in (first, first + 1):
        cached.append(graph.input(f"cached{number}", TensorProto.FLOAT, shape))
        written.append(graph.output(f"written{number}", shape))
    return cached, written
