"""Decoder layers as a graph for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto

from fastvlm.language.masks import MaskKind
from fastvlm.runtimes.attention_graph import Attention, CausalAttention, MaskedAttention
from fastvlm.runtimes.layer_form import LayerForm, Norm, Product
from fastvlm.runtimes.onnx_graph import OnnxGraph


@dataclass(frozen=True, slots=True)
class Rotation:
    """How queries and keys are rotated.

    Args:
        number: Of the rotations, among those of the decoder.
        size: Values of each head that are rotated, from the first on.
        interleaved: Whether neighbouring values are rotated, rather than those half a size apart.
    """

    number: int
    size: int
    interleaved: bool


@dataclass(frozen=True, slots=True)
class GraphLayer:
    """A layer of a graph.

    Args:
        form: What it computes.
        rotation: How it rotates queries and keys.
        mask: What it sees.
    """

    form: LayerForm
    rotation: Rotation
    mask: MaskKind

    @property
    def width(self) -> int:
        """Size of the hidden states."""
        return len(self.form.down.weight)


def layers_graph(
    layers: Sequence[GraphLayer], bits: int | None, *, masked: bool, exit_layer: int | None = None
) -> OnnxGraph:
    """Return the graph of layers that follow one another: `y` of `x`, see `enter_layers`.

    Args:
        layers: The layers, one or more.
        bits: See `OnnxGraph`.
        masked: See `enter_layers`.
        exit_layer: After how many layers states are an output too, `exit`; None for no such output.
    """
    graph = OnnxGraph(bits)
    states = enter_layers(graph, layers, masked=masked)
    if exit_layer is not None:
        name_output(graph, states[exit_layer - 1], "exit", "d_model")
    name_output(graph, states[-1], "y", "d_model")
    return graph


def head_graph(norm: Norm | None, head: Product, bits: int | None) -> OnnxGraph:
    """Return the graph from hidden states, `x`, to logits, `y`.

    Args:
        norm: The final norm; None where the states are normed.
        head: The LM head, or some of its rows.
        bits: See `OnnxGraph`.
    """
    graph = OnnxGraph(bits)
    normed = add_norm(
        graph, graph.input("x", TensorProto.FLOAT, ["batch", "width", "d_model"]), norm
    )
    made = graph.linear(normed, head.weight, head.bias)
    name_output(graph, made, "y", "logits")
    return graph


def name_output(graph: OnnxGraph, x: str, name: str, size: str) -> None:
    """Make something an output: (batch, width, size)."""
    graph.add("Identity", [x], [name])
    graph.output(name, ["batch", "width", size])


def enter_layers(graph: OnnxGraph, layers: Sequence[GraphLayer], *, masked: bool) -> list[str]:
    """Add layers that follow one another, and what they are given; return the states after each.

    They are given `x`, (batch, width, d_model), and `cos{n}` and `sin{n}`, (batch, computed, size),
    for each kind of rotations. For the other inputs see `CausalAttention` and `MaskedAttention`.

    Args:
        graph: The graph, empty.
        layers: The layers, one or more.
        masked: Whether a pass says what its positions see; else they see all before them, within
            their layer's window.
    """
    graph.input("x", TensorProto.FLOAT, ["batch", "width", "d_model"])
    for rotation in dict.fromkeys(one.rotation for one in layers):
        for name in ("cos", "sin"):
            shape: list[str | int] = ["batch", "computed", rotation.size // 2]
            graph.input(f"{name}{rotation.number}", TensorProto.FLOAT, shape)
    kinds = list(dict.fromkeys(one.mask for one in layers))
    attention = MaskedAttention(graph, kinds) if masked else CausalAttention(graph)
    x, normed = "x", add_norm(graph, "x", layers[0].form.norms.get("before_attention"))
    states = []
    for index, layer in enumerate(layers):
        norms = layer.form.norms
        made = _attended(graph, attention, layer, normed)
        made = add_norm(graph, made, norms.get("after_attention"))
        x, normed = _added(graph, made, x, norms.get("before_mlp"))
        made = add_norm(graph, _fed_forward(graph, layer.form, normed), norms.get("after_mlp"))
        if index + 1 < len(layers):
            x, normed = _added(graph, made, x, layers[index + 1].form.norms.get("before_attention"))
        else:
            x = graph.add("Add", [made, x])
        states.append(x)
    return states


def add_norm(graph: OnnxGraph, x: str, norm: Norm | None) -> str:
    """Add a norm over the last axis; None leaves `x` as it is."""
    if norm is None:
        return x
    given: dict[str, Any] = {"axis": -1, "epsilon": norm.eps}
    scale = graph.weight(norm.weight.float())
    if norm.bias is None:
        found: str = graph.add("SimplifiedLayerNormalization", [x, scale], **given)
    else:
        inputs = [x, scale, graph.weight(norm.bias.float())]
        found = graph.add("LayerNormalization", inputs, **given)
    return found


def _added(graph: OnnxGraph, made: str, x: str, norm: Norm | None) -> tuple[str, str]:
    """Return the sum of what was made and the states, and that normed."""
    if norm is None or norm.bias is not None:
        total = graph.add("Add", [made, x])
        return total, add_norm(graph, total, norm)
    names = [f"{made}_normed", "", "", f"{made}_added"]
    inputs = [made, x, graph.weight(norm.weight.float())]
    graph.add("SkipSimplifiedLayerNormalization", inputs, names, epsilon=norm.eps)
    return names[3], names[0]


def _attended(graph: OnnxGraph, attention: Attention, layer: GraphLayer, x: str) -> str:
    """Return what attention makes of normed states: (batch, width, d_model)."""
    form = layer.form.attention
    qkv = attention.enter(graph.linear(x, form.qkv.weight, form.qkv.bias))
    sizes = [count * form.head_dim for count in (form.heads, form.kv_heads, form.kv_heads)]
    queries, keys, values = graph.add("Split", [qkv, graph.constant(*sizes)], 3, axis=-1)
    rotation = layer.rotation
    tables = [f"cos{rotation.number}", f"sin{rotation.number}"]
    given: dict[str, Any] = {"interleaved": int(rotation.interleaved)}
    if rotation.size < form.head_dim:
        given["rotary_embedding_dim"] = rotation.size
    turned = []
    for one, heads, norm in (
        (queries, form.heads, form.q_norm),
        (keys, form.kv_heads, form.k_norm),
    ):
        normed = _heads_normed(graph, one, norm, form.head_dim)
        inputs = [normed, *tables]
        turned.append(graph.add("RotaryEmbedding", inputs, num_heads=heads, **given))
    heads_out = attention.attend(form, layer.mask, (turned[0], turned[1], values))
    return graph.linear(heads_out, form.out.weight, form.out.bias)


def _heads_normed(graph: OnnxGraph, x: str, norm: Norm | None, head_dim: int) -> str:
    """Return queries or keys normed, each head by itself where the norm is as wide as one."""
    if norm is None or len(norm.weight) != head_dim:
        return add_norm(graph, x, norm)
    heads = graph.add("Reshape", [x, graph.constant(0, 0, -1, head_dim)])
    found: str = graph.add("Reshape", [add_norm(graph, heads, norm), graph.constant(0, 0, -1)])
    return found


def _fed_forward(graph: OnnxGraph, form: LayerForm, x: str) -> str:
    """Return what the feed-forward part makes of normed states: (batch, width, d_model)."""
    return add_gated(graph, x, form.gate_up, form.activation, form.down)


def add_gated(graph: OnnxGraph, x: str, gate_up: Product, activation: str, down: Product) -> str:
    """Add a gated feed-forward part, see `LayerForm`."""
    both = graph.linear(x, gate_up.weight, gate_up.bias)
    gate, up = graph.add("Split", [both], 2, axis=-1, num_outputs=2)
    opened = graph.add("Mul", [add_activation(graph, gate, activation), up])
    return graph.linear(opened, down.weight, down.bias)


def add_activation(graph: OnnxGraph, x: str, name: str) -> str:
    """Add one of `layer_form.ACTIVATIONS`."""
    if name == "silu":
        found: str = graph.add("QuickGelu", [x], alpha=1.0)
    elif name == "relu":
        found = graph.add("Relu", [x])
    else:
        found = graph.add("Gelu", [x], approximate="tanh" if name == "gelu_tanh" else "none")
    return found
