"""A whole draft step as one graph for ONNX Runtime.

Of a small model it is mostly the calling of graphs that a draft step takes, and it is made once for
each drafted token: the exit layers, the network and the head are called at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvlm.functional.threads import usual_threads
from fastvlm.runtimes.attention_graph import PassKind
from fastvlm.runtimes.graph_parts import Head, add_gated, add_head, add_norm, name_output
from fastvlm.runtimes.layer_form import GraphLayer, Norm, Product, linear_form, norm_form
from fastvlm.runtimes.layer_graph import enter_layers
from fastvlm.runtimes.layer_pass import LayerPass, PassInputs
from fastvlm.runtimes.layer_stack import cached_layers, rotations_of
from fastvlm.runtimes.onnx_graph import OnnxGraph


class DraftLayers(NamedTuple):
    """What a draft step computes.

    Args:
        layers: The exit layers, and then the network's blocks.
        exit_layer: How many are exit layers.
        mlp: The network's norm, gate with values, and product down, in place of blocks; None for
            none.
        head: The final norm, and the LM head's rows of the tokens that can be drafted.
    """

    layers: Sequence[GraphLayer]
    exit_layer: int
    mlp: tuple[Norm, Product, Product] | None
    head: Head

    @property
    def size(self) -> int:
        """How many weights it reads."""
        forms = [layer.form for layer in self.layers]
        products = [self.head.product, *(self.mlp[1:] if self.mlp else ())]
        for form in forms:
            products += form.attention.qkv, form.attention.out, form.gate_up, form.down
        return sum(product.weight.numel() for product in products)


class DraftPass:
    """A draft step, ready to run.

    Args:
        step: What it computes.
        bits: See `OnnxGraph`.
    """

    def __init__(self, step: DraftLayers, bits: int | None) -> None:
        layers = step.layers
        self.step, self.bits = step, bits
        self.masks = list(dict.fromkeys(layer.mask for layer in layers))
        self.caches, self.rotations = cached_layers(layers), rotations_of(layers)
        self._passes: dict[PassKind, LayerPass] = {}

    def run(self, x: Tensor, given: PassInputs) -> list[Tensor]:
        """Return the exit layer's states and the logits, see `SplitDecoder.draft_step`."""
        kind: PassKind = "single" if len(x) == 1 else "batched"
        if kind not in self._passes:
            step = self.step
            outputs = {"exit": step.layers[0].width, "logits": len(step.head.product.weight)}
            graph = draft_graph(step, self.bits, kind)
            self._passes[kind] = LayerPass(graph, kind, outputs)
        return self._passes[kind].run(x, given)


@usual_threads()
def draft_graph(step: DraftLayers, bits: int | None, kind: PassKind) -> OnnxGraph:
    """Return the graph from hidden states, `x`, to those of the exit layer and to logits.

    They are `exit`, (batch, width, d_model), and `logits`, (batch, width, tokens). For the inputs
    see `enter_layers`.

    Args:
        step: What it computes.
        bits: See `OnnxGraph`.
        kind: What passes it is for.
    """
    graph = OnnxGraph(bits)
    states = enter_layers(graph, step.layers, kind)
    name_output(graph, states[step.exit_layer - 1], "exit", "d_model")
    name_output(graph, add_drafter(graph, step, states[-1]), "logits", "tokens")
    return graph


def add_drafter(graph: OnnxGraph, step: DraftLayers, x: str) -> str:
    """Add what makes logits of the states after a draft step's layers."""
    if step.mlp is not None:
        norm, gate_up, down = step.mlp
        made = add_gated(graph, add_norm(graph, x, norm), gate_up, "silu", down)
        x = graph.add("Add", [x, made])
    return add_head(graph, x, step.head)


def mlp_form(mlp: nn.Module) -> tuple[Norm, Product, Product]:
    """Return what a `GatedMlp` computes, as `DraftLayers` has it."""
    own: Any = mlp
    both = torch.cat([linear_form(own.gate_proj).weight, linear_form(own.up_proj).weight])
    return norm_form(own.norm), Product(both, None), linear_form(own.down_proj)
