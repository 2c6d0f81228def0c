"""Attention in a graph for ONNX Runtime, which writes keys and values where the cache keeps them.

A pass computes `width` positions in each of its rows, from a start of each row's own. Its numbers
depend on neither the width nor the rows beside: products with weights round each row alike, and
attention, whose products of one row would round otherwise, computes each row of the batch by
itself, two positions or more. So a verify gives the logits of ordinary decoding to the last bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from onnx import TensorProto, helper

from fastvlm.language.masks import MaskKind
from fastvlm.runtimes.graph_parts import add_norm
from fastvlm.runtimes.layer_form import AttentionForm, GraphLayer, Norm
from fastvlm.runtimes.onnx_graph import CONTRIBUTED, OnnxGraph

PassKind = Literal["single", "batched", "masked"]
"""What a graph is made for: passes of one row, of any rows, or of any that say what they see."""


ROTATED_AT_ONCE = 8
"""Cosines are of a multiple of so many where `GroupQueryAttention` rotates."""


class Attention(ABC):
    """Attention of a graph's layers.

    Args:
        graph: The graph, which has `cos{n}` and `sin{n}` for each kind of rotations.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph, self.cached = graph, 0
        """The number of the next layer's keys in the cache, see `SingleAttention`."""

    @abstractmethod
    def attend(self, layer: GraphLayer, qkv: str) -> str:
        """Return what a layer's heads read: (batch, width, heads * head_dim).

        Args:
            layer: The layer.
            qkv: Queries, keys and values, one after another: (batch, width, size).
        """

    def declare_cache(self, shape: Sequence[str | int] | None) -> tuple[list[str], list[str]]:
        """Declare a layer's keys and values as inputs and outputs; return the names of both."""
        cached, written = [], []
        for number in (self.cached, self.cached + 1):
            cached.append(self.graph.input(f"cached{number}", TensorProto.FLOAT, shape))
            written.append(self.graph.output(f"written{number}", shape))
        self.cached += 2
        return cached, written

    def split(self, form: AttentionForm, qkv: str) -> tuple[str, str, str]:
        """Return queries, keys and values, normed."""
        graph, size = self.graph, form.head_dim
        sizes = [count * size for count in (form.heads, form.kv_heads, form.kv_heads)]
        queries, keys, values = graph.add("Split", [qkv, graph.constant(*sizes)], 3, axis=-1)
        return (
            self._normed(queries, form.q_norm, size),
            self._normed(keys, form.k_norm, size),
            values,
        )

    def _normed(self, x: str, norm: Norm | None, head_dim: int) -> str:
        """Return queries or keys normed, each head by itself where the norm is as wide as one."""
        graph = self.graph
        if norm is None or len(norm.weight) != head_dim:
            return add_norm(graph, x, norm)
        heads = graph.add("Reshape", [x, graph.constant(0, 0, -1, head_dim)])
        found: str = graph.add("Reshape", [add_norm(graph, heads, norm), graph.constant(0, 0, -1)])
        return found

    def rotated(self, layer: GraphLayer, qkv: str, *places: str) -> tuple[str, str, str]:
        """Return queries, keys and values, normed and rotated.

        Args:
            layer: The layer.
            qkv: See `attend`.
            places: Where the tables have the positions; without, they are of these alone.
        """
        form, rotation = layer.form.attention, layer.rotation
        queries, keys, values = self.split(form, qkv)
        given: dict[str, Any] = {"interleaved": int(rotation.interleaved)}
        if rotation.size < form.head_dim:
            given["rotary_embedding_dim"] = rotation.size
        turned = [
            self.graph.add(
                "RotaryEmbedding", [one, *rotation.tables, *places], num_heads=heads, **given
            )
            for one, heads in ((queries, form.heads), (keys, form.kv_heads))
        ]
        return turned[0], turned[1], values


class SingleAttention(Attention):
    """Attention of one row to all positions up to its own, or to a window of them.

    A pass of one position computes the next one too, of which nothing is kept: what it writes there
    is overwritten before it is read. Inputs of a pass:

        rows: The positions that attention computes: (computed,), 0 twice for a pass of one.
        kept: Those of them that count: (width,).
        last: The last position that it computes in each row: (1,).
        total: How many positions each row has then: ().
        cached{n}: Keys of layer n / 2, and values with an odd number: (1, kv_heads, capacity,
            head_dim). `written{n}` is the same memory.
        places: Where the tables of rotations have those of the pass: (1, computed).

    The tables of rotations are (capacity, size).
    """

    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__(graph)
        _declare_causal(graph)
        graph.input("places", TensorProto.INT64, None)

    def attend(self, layer: GraphLayer, qkv: str) -> str:
        """Return what a layer's heads read. See `Attention.attend`."""
        graph, form, rotation = self.graph, layer.form.attention, layer.rotation
        qkv = graph.add("Gather", [qkv, "rows"], axis=1)
        settings, tables = settings_of(layer), [*rotation.tables, "places"]
        # Each operator costs as much as a small product: this one can split and rotate, too.
        if rotation.size % (2 * ROTATED_AT_ONCE):
            heads, tables = [*self.rotated(layer, qkv, "places")], []
        else:
            settings |= {"do_rotary": 1, "rotary_interleaved": int(rotation.interleaved)}
            normed = form.q_norm is not None or form.k_norm is not None
            heads = [*self.split(form, qkv)] if normed else [qkv, "", ""]
        name = f"attention{self.cached}"
        cached, written = self.declare_cache(None)
        inputs = [*heads, *cached, "last", "total", *tables]
        graph.add("GroupQueryAttention", inputs, [name, *written], **settings)
        found: str = graph.add("Gather", [name, "kept"], axis=1)
        return found


class BatchedAttention(Attention):
    """Attention of each row to all positions up to its own, or to a window of them.

    Inputs of a pass are those of `SingleAttention` but for `places`, and:

        direct: Whether it has one row.

    Of several rows `last` is (batch, 1), `total` (batch,), and keys and values are (batch, 1,
    kv_heads, capacity, head_dim). The tables of rotations are (batch, computed, size).
    """

    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__(graph)
        _declare_causal(graph)
        graph.input("direct", TensorProto.BOOL, [])

    def attend(self, layer: GraphLayer, qkv: str) -> str:
        """Return what a layer's heads read. See `Attention.attend`."""
        graph = self.graph
        heads = self.rotated(layer, graph.add("Gather", [qkv, "rows"], axis=1))
        name = f"attention{self.cached}"
        cached, written = self.declare_cache(None)
        settings = settings_of(layer)

        def attention(inputs: Sequence[str], outputs: Sequence[str]) -> Any:
            return helper.make_node(
                "GroupQueryAttention", inputs, outputs, domain=CONTRIBUTED, **settings
            )

        inputs = [*heads, *cached, "last", "total"]
        outputs = [f"{name}_direct{index}" for index in range(3)]
        one_row = graph.branch(f"{name}_one", [attention(inputs, outputs)], outputs)
        rows = self._row_by_row(name, inputs, attention)
        attended = f"{name}_heads"
        made = [attended, *written]
        graph.add("If", ["direct"], made, then_branch=one_row, else_branch=rows)
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


class MaskedAttention(Attention):
    """Attention to the positions that a pass says.

    Inputs of a pass:

        mask{n}: What is added to the scores of layers of the n-th kind: (batch or 1, 1, 1, width,
            end).
        starts: The first position of each row: (batch,).
        end: How many positions are read: (1,).
        cached{n}: See `SingleAttention`; (batch, kv_heads, capacity, head_dim).

    The tables of rotations are (batch, width, size).

    Args:
        graph: The graph.
        kinds: What the layers see, without repetitions.
    """

    def __init__(self, graph: OnnxGraph, kinds: Sequence[MaskKind]) -> None:
        super().__init__(graph)
        self.kinds = list(kinds)
        for index in range(len(kinds)):
            shape: list[str | int] = ["rows", 1, 1, "width", "end"]
            graph.input(f"mask{index}", TensorProto.FLOAT, shape)
        graph.input("starts", TensorProto.INT64, ["batch"])
        graph.input("end", TensorProto.INT64, [1])

    def attend(self, layer: GraphLayer, qkv: str) -> str:
        """Return what a layer's heads read. See `Attention.attend`."""
        graph, form = self.graph, layer.form.attention
        size = form.head_dim
        heads = self.rotated(layer, qkv)
        cached, written = self.declare_cache(["batch", form.kv_heads, "capacity", size])
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
        scores = graph.add("Add", [scores, f"mask{self.kinds.index(layer.mask)}"])
        attended = graph.add("MatMul", [graph.add("Softmax", [scores], axis=-1), read[1]])
        attended = graph.add("Transpose", [attended], perm=[0, 3, 1, 2, 4])
        found: str = graph.add("Reshape", [attended, graph.constant(0, 0, -1)])
        return found


def attention_of(graph: OnnxGraph, layers: Sequence[GraphLayer], kind: PassKind) -> Attention:
    """Return the attention of some layers, having declared what it and rotations are given."""
    for rotation in dict.fromkeys(one.rotation for one in layers):
        tables: list[str | int] = ["positions", rotation.size // 2]
        shape = tables if kind == "single" else ["batch", *tables]
        for name in rotation.tables:
            graph.input(name, TensorProto.FLOAT, shape)
    if kind == "single":
        return SingleAttention(graph)
    if kind == "batched":
        return BatchedAttention(graph)
    return MaskedAttention(graph, list(dict.fromkeys(one.mask for one in layers)))


def _declare_causal(graph: OnnxGraph) -> None:
    """Declare what `SingleAttention` and `BatchedAttention` are both given."""
    graph.input("rows", TensorProto.INT64, ["computed"])
    graph.input("kept", TensorProto.INT64, ["width"])
    graph.input("last", TensorProto.INT32, None)
    graph.input("total", TensorProto.INT32, None)


def settings_of(layer: GraphLayer) -> dict[str, Any]:
    """Return the attributes of `GroupQueryAttention`."""
    form = layer.form.attention
    return {
        "num_heads": form.heads,
        "kv_num_heads": form.kv_heads,
        "scale": form.scale,
        "softcap": form.softcap,
        "local_window_size": layer.mask.window or -1,
    }
