"""The LM head in ONNX Runtime: of all tokens, and of those that can be drafted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvlm.runtimes.graph_parts import Head
from fastvlm.runtimes.layer_graph import head_graph
from fastvlm.runtimes.layer_pass import bind
from fastvlm.runtimes.onnx_graph import OnnxGraph

MAX_RESTRICTED = 8
"""Sets of tokens whose logits are made by a graph of their own, kept at once."""


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


class HeadPasses:
    """Passes of the LM head, each made when it is first run.

    Args:
        read: Returns what makes logits of hidden states, given rows of the LM head, None for all,
            and, as `normed`, whether the states are normed already.
        bits: See `OnnxGraph`.
    """

    def __init__(self, read: Callable[..., Head], bits: int | None) -> None:
        self.read, self.bits = read, bits
        self._made: dict[tuple[bool, tuple[int, int] | None], tuple[HeadPass, Tensor | None]] = {}

    def run(self, x: Tensor, rows: Tensor | None = None, *, normed: bool = False) -> Tensor:
        """Return the logits of states, (..., d_model), of all tokens or of those of some rows."""
        key = normed, None if rows is None else (rows.data_ptr(), len(rows))
        if key not in self._made:
            restricted = [one for one, (_, held) in self._made.items() if held is not None]
            if len(restricted) == MAX_RESTRICTED:
                del self._made[restricted[0]]
            head = self.read(rows, normed=normed)
            graph = head_graph(head, self.bits)
            # The rows stay, so that no others come to lie where they do.
            self._made[key] = HeadPass(graph, len(head.product.weight)), rows
        return self._made[key][0].run(x)
