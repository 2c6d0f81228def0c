"""Parts of graphs for ONNX Runtime: norms, the feed-forward part, the LM head."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastvlm.runtimes.layer_form import Norm, Product
from fastvlm.runtimes.onnx_graph import OnnxGraph


class Head(NamedTuple):
    """What makes logits of hidden states.

    Args:
        norm: The final norm; None where the states are normed.
        product: The LM head, or some of its rows.
    """

    norm: Norm | None
    product: Product


def name_output(graph: OnnxGraph, x: str, name: str, size: str) -> None:
    """Make something an output: (batch, width, size)."""
    graph.add("Identity", [x], [name])
    graph.output(name, ["batch", "width", size])


def add_head(graph: OnnxGraph, x: str, head: Head) -> str:
    """Add what makes logits of hidden states."""
    norm, product = head
    return graph.linear(add_norm(graph, x, norm), product.weight, product.bias)


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


def add_residual(graph: OnnxGraph, made: str, x: str, norm: Norm | None) -> tuple[str, str]:
    """Add what was made to the states; return the sum, and that normed."""
    if norm is None or norm.bias is not None:
        total = graph.add("Add", [made, x])
        return total, add_norm(graph, total, norm)
    names = [f"{made}_normed", "", "", f"{made}_added"]
    inputs = [made, x, graph.weight(norm.weight.float())]
    graph.add("SkipSimplifiedLayerNormalization", inputs, names, epsilon=norm.eps)
    return names[3], names[0]


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
