"""Decoder layers as a graph for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto
from torch import Tensor

from fastvlm.functional.threads import usual_threads
from fastvlm.runtimes.attention_graph import Attention, PassKind, attention_of
from fastvlm.runtimes.graph_parts import (
    Head,
    add_gated,
    add_head,
    add_norm,
    add_residual,
    name_output,
)
from fastvlm.runtimes.layer_form import GraphLayer
from fastvlm.runtimes.onnx_graph import OnnxGraph


@usual_threads()
def layers_graph(
    layers: Sequence[GraphLayer],
    bits: int | None,
    kind: PassKind,
    *,
    exit_layer: int = 0,
    head: Head | None = None,
    embedding: Tensor | None = None,
) -> OnnxGraph:
    """Return the graph of layers that follow one another: `y` of `x`, see `enter_layers`.

    Args:
        layers: The layers, one or more.
        bits: See `OnnxGraph`.
        kind: What passes it is for.
        exit_layer: After how many layers states are an output too, `exit`; 0 for no such output.
        head: What makes `y`, logits, of the last states; None for these themselves.
        embedding: The rows of all tokens, (vocabulary, d_model), where `x` are tokens; None where
            they are states.
    """
    graph = OnnxGraph(bits)
    states = enter_layers(graph, layers, kind, embedding)
    if exit_layer:
        name_output(graph, states[exit_layer - 1], "exit", "d_model")
    if head is None:
        name_output(graph, states[-1], "y", "d_model")
    else:
        name_output(graph, add_head(graph, states[-1], head), "y", "tokens")
    return graph


@usual_threads()
def head_graph(head: Head, bits: int | None) -> OnnxGraph:
    """Return the graph from hidden states, `x`, to logits, `y`. For the bits see `OnnxGraph`."""
    graph = OnnxGraph(bits)
    x = graph.input("x", TensorProto.FLOAT, ["batch", "width", "d_model"])
    name_output(graph, add_head(graph, x, head), "y", "tokens")
    return graph


def enter_layers(
    graph: OnnxGraph,
    layers: Sequence[GraphLayer],
    kind: PassKind,
    embedding: Tensor | None = None,
) -> list[str]:
    """Add layers that follow one another, and what they are given; return the states after each.

    They are given `x`, (batch, width, d_model), or tokens, (batch, width), and `cos{n}` and
    `sin{n}` for each kind of rotations. For these and the other inputs see `SingleAttention`,
    `BatchedAttention` and `MaskedAttention`.

    Args:
        graph: The graph, empty.
        layers: The layers, one or more.
        kind: What passes the graph is for.
        embedding: See `layers_graph`.
    """
    if embedding is None:
        x = graph.input("x", TensorProto.FLOAT, ["batch", "width", "d_model"])
    else:
        token_ids = graph.input("x", TensorProto.INT64, ["batch", "width"])
        x = graph.rows(embedding, token_ids)
    return add_layers(graph, layers, attention_of(graph, layers, kind), x)


def add_layers(
    graph: OnnxGraph,
    layers: Sequence[GraphLayer],
    attention: Attention,
    x: str,
    kept: str | None = None,
) -> list[str]:
    """Add layers that follow one another; return the states after each.

    Args:
        graph: The graph.
        layers: The layers, one or more.
        attention: What computes their attention.
        x: The states before the first: (batch, width, d_model).
        kept: The positions whose states after the last layer count, (kept,): of others it computes
            only what they are attended by. None for all.
    """
    normed = add_norm(graph, x, layers[0].form.norms.get("before_attention"))
    states = []
    for index, layer in enumerate(layers):
        form, norms = layer.form, layer.form.norms
        own = form.attention
        heads = attention.attend(layer, graph.linear(normed, own.qkv.weight, own.qkv.bias))
        if kept is not None and index + 1 == len(layers):
            heads, x = (graph.add("Gather", [one, kept], axis=1) for one in (heads, x))
        made = graph.linear(heads, own.out.weight, own.out.bias)
        made = add_norm(graph, made, norms.get("after_attention"))
        x, normed = add_residual(graph, made, x, norms.get("before_mlp"))
        made = add_norm(
            graph,
            add_gated(graph, normed, form.gate_up, form.activation, form.down),
            norms.get("after_mlp"),
        )
        if index + 1 < len(layers):
            x, normed = add_residual(
                graph, made, x, layers[index + 1].form.norms.get("before_attention")
            )
        else:
            x = graph.add("Add", [made, x])
        states.append(x)
    return states
