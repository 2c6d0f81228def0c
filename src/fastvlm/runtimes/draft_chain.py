"""Several draft steps as one graph for ONNX Runtime, each with the token of the one before.

Of a small model most of a draft step is what calls it: embedding, tables, the reading of the best
token. In one graph a step takes a third. Its weights have 8 bits, whatever the target's have, and
rows go through attention together: a draft need not round as anything else does, as a verify
computes all layers of its positions anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from onnx import TensorProto, helper
from torch import Tensor

from fastvlm.functional.threads import usual_threads
from fastvlm.language.draft_path import Draws
from fastvlm.runtimes.attention_graph import ROTATED_AT_ONCE, Attention, settings_of
from fastvlm.runtimes.draft_graph import DraftLayers, add_drafter
from fastvlm.runtimes.layer_form import GraphLayer
from fastvlm.runtimes.layer_graph import add_layers
from fastvlm.runtimes.layer_pass import KEPT_WIDTH, PassInputs, bind
from fastvlm.runtimes.onnx_graph import OnnxGraph
from fastvlm.runtimes.quantised_weights import QuantisedMatrices

ALONE = 2**22
"""Weights of a step up to which one thread computes it for one row: others would have to be woken
for each of its products, and that takes longer than these."""


class ChainKind(NamedTuple):
    """What tells the chains of one drafter apart.

    Args:
        steps: How many steps.
        draws: Whether they draw their tokens.
        batched: Whether they are of several rows.
    """

    steps: int
    draws: bool
    batched: bool


class ChainParts(NamedTuple):
    """What a chain of draft steps computes.

    Args:
        step: Each step.
        tokens: Those that can be drafted, as the head's rows stand for them: (tokens,).
        embedded: What enters the first layer of each of them: (tokens, d_model).
        matrices: Those of all its chains, in 8 bits.
    """

    step: DraftLayers
    tokens: Tensor
    embedded: Tensor
    matrices: QuantisedMatrices

    @property
    def looks_back(self) -> bool:
        """Whether there are blocks, which keep keys and values of positions of their own."""
        return len(self.step.layers) > self.step.exit_layer

    @property
    def is_known(self) -> bool:
        """Whether attention can rotate as the layers do."""
        return not any(layer.rotation.size % (2 * ROTATED_AT_ONCE) for layer in self.step.layers)


class ChainedAttention(Attention):
    """Attention of steps that follow one another, a position of each row in each.

    Inputs of a pass, for each step n:

        last{n}: Each row's position: (batch,).
        total{n}: How many positions the longest row has then: ().
        place{n}: Where the tables of rotations have them: (batch, 1).

    And `places`, (batch, positions), where they have those of a first step that looks back.

    All steps read and write `cached{m}`, the keys of layer m / 2, and values with an odd number:
    (batch, kv_heads, capacity, head_dim). `written{m}_{n}` is the same memory. A step begins with
    the tokens of the one before, and so not before that has written.
    """

    def __init__(self, graph: OnnxGraph, layers: Sequence[GraphLayer], steps: int) -> None:
        super().__init__(graph)
        self.step, self.places = 0, "place0"
        for name in dict.fromkeys(name for layer in layers for name in layer.rotation.tables):
            graph.input(name, TensorProto.FLOAT, None)
        for number in range(2 * len(layers)):
            graph.input(f"cached{number}", TensorProto.FLOAT, None)
        for number in range(steps):
            graph.input(f"last{number}", TensorProto.INT32, None)
            graph.input(f"total{number}", TensorProto.INT32, None)
            graph.input(f"place{number}", TensorProto.INT64, None)

    def begin(self, step: int) -> None:
        """Go on with the first layer of a step."""
        self.step, self.cached, self.places = step, 0, f"place{step}"

    def look_back(self) -> None:
        """Go on with positions before the step's own."""
        self.places = self.graph.input("places", TensorProto.INT64, None)

    def attend(self, layer: GraphLayer, qkv: str) -> str:
        """Return what a layer's heads read. See `Attention.attend`."""
        graph, form, step = self.graph, layer.form.attention, self.step
        normed = form.q_norm is not None or form.k_norm is not None
        heads = [*self.split(form, qkv)] if normed else [qkv, "", ""]
        numbers = self.cached, self.cached + 1
        self.cached += 2
        written = [graph.output(f"written{number}_{step}", None) for number in numbers]
        inputs = [*heads, *(f"cached{number}" for number in numbers), f"last{step}", f"total{step}"]
        inputs += [*layer.rotation.tables, self.places]
        name = f"attention{numbers[0]}_{step}"
        settings = {"do_rotary": 1, "rotary_interleaved": int(layer.rotation.interleaved)}
        graph.add("GroupQueryAttention", inputs, [name, *written], **settings, **settings_of(layer))
        return name


@usual_threads()
def chain_graph(parts: ChainParts, steps: int, *, draws: bool) -> OnnxGraph:
    """Return the graph from embedded tokens, `x`, to those of each step, and how likely these are.

    They are (batch, 1, d_model), and `tokens` and `chances`, (batch, steps) each. What blocks are
    to see before the first step's states is `behind`, (batch, positions, d_model), and `kept`,
    (1,), how many these are.

    Args:
        parts: What each step computes.
        steps: How many.
        draws: Whether a step's token is the best one after its logits were multiplied by `scale`,
            (batch, 1, 1), and `noise{n}` was added to those of step n, (batch, 1, tokens).
    """
    graph = OnnxGraph(parts.matrices.bits, parts.matrices)
    layers, exit_layer = parts.step.layers, parts.step.exit_layer
    attention = ChainedAttention(graph, layers, steps)
    # With sizes that are known, the cache would be taken to be as long as what a step adds.
    x = graph.input("x", TensorProto.FLOAT, ["batch", "width", "d_model"])
    drafted = graph.weight(parts.embedded)
    scale = graph.input("scale", TensorProto.FLOAT, None) if draws else ""
    last, found, likely = graph.constant(-1), [], []
    for number in range(steps):
        attention.begin(number)
        if number or not parts.looks_back:
            x = add_layers(graph, layers, attention, x)[-1]
        else:
            exits = add_layers(graph, layers[:exit_layer], attention, x)[-1]
            behind = graph.input("behind", TensorProto.FLOAT, ["batch", "behind", "d_model"])
            attention.look_back()
            x = graph.add("Concat", [behind, exits], axis=1)
            kept = graph.input("kept", TensorProto.INT64, ["width"])
            x = add_layers(graph, layers[exit_layer:], attention, x, kept)[-1]
        scores = logits = add_drafter(graph, parts.step, x)
        if draws:
            logits = graph.add("Mul", [logits, scale])
            noise = graph.input(f"noise{number}", TensorProto.FLOAT, None)
            scores = graph.add("Add", [logits, noise])
        best = graph.add("ArgMax", [scores], axis=-1, keepdims=0)
        found.append(best)
        likely.append(logits)
        x = graph.add("Gather", [drafted, best])
    # What no step waits for is computed of all of them at once.
    best = graph.add("Concat", found, axis=1)
    graph.add("Gather", [graph.weight(parts.tokens), best], ["tokens"])
    likely = graph.add("Softmax", [graph.add("Concat", likely, axis=1)], axis=-1)
    chances = graph.add("GatherElements", [likely, graph.add("Unsqueeze", [best, last])], axis=-1)
    graph.add("Squeeze", [chances, last], ["chances"])
    for name, dtype in (("tokens", TensorProto.INT64), ("chances", TensorProto.FLOAT)):
        graph.outputs.append(helper.make_tensor_value_info(name, dtype, ["batch", "steps"]))
    return graph


@dataclass(slots=True)
class _Bound:
    """Inputs and outputs of passes of one shape. The session reads and writes them where they lie.

    Their names are those of `chain_graph` and `ChainedAttention`; `tables` are those of rotations.
    """

    binding: Any
    inputs: dict[str, Tensor]
    """All that is bound and doesn't depend on where the cache lies: it must stay."""
    arrays: dict[str, Any]
    """What tells steps their places, as arrays of NumPy; those of all steps in one."""
    x: Tensor
    behind: Tensor
    scale: Tensor
    noise: Tensor
    tokens: Tensor
    chances: Tensor
    tables: dict[str, Tensor] = field(default_factory=dict)
    memory: tuple[Any, ...] = ()
    """What stands for where keys, values and tables of all positions lie that are bound."""


class DraftChain:
    """Some draft steps, ready to run.

    Args:
        parts: What each step computes.
        kind: What they are for.
    """

    def __init__(self, parts: ChainParts, kind: ChainKind) -> None:
        self.parts, self.steps, self.draws = parts, kind.steps, kind.draws
        graph = chain_graph(parts, kind.steps, draws=kind.draws)
        alone = not kind.batched and parts.step.size <= ALONE
        self._session, self._weights = graph.session(1 if alone else None)
        self._bound: dict[tuple[int, int], _Bound] = {}

    @torch.inference_mode()
    def run(
        self,
        x: Tensor,
        given: PassInputs,
        behind: Tensor | None = None,
        draws: Draws | None = None,
    ) -> list[tuple[list[int], list[float]]]:
        """Return each step's tokens, and their probabilities, by rows.

        Args:
            x: What enters the first layer at each row's first position: (batch, 1, d_model).
            given: The first position of each row, with those behind; rotations of all; the cache.
            behind: See `DraftsAhead.draft_ahead`.
            draws: How tokens are drawn, if they are.
        """
        rows, before = len(x), 0 if behind is None else behind.shape[1]
        bound = self._bound.get((rows, before)) or self._bind(rows, before)
        if before <= KEPT_WIDTH:
            self._bound[rows, before] = bound
        bound.x.copy_(x)
        if behind is not None:
            bound.behind.copy_(behind)
        if draws is not None:
            torch.reciprocal(draws.temperatures[:, None, None], out=bound.scale)
            bound.noise[:, :, 0] = draws.noise
        self._bind_memory(bound, given)
        places = given.starts
        if not given.by_position:
            width = before + self.steps
            places = range(0, rows * width, width)
            for name, values in given.rotations.items():
                bound.tables[name][: rows * width].view(rows, width, -1).copy_(values)
        starts = [start + before for start in given.starts]
        steps, arrays = range(self.steps), bound.arrays
        arrays["last"][:] = [[start + step for start in starts] for step in steps]
        arrays["total"][:] = range(max(starts) + 1, max(starts) + 1 + self.steps)
        arrays["place"][:] = [[first + before + step for first in places] for step in steps]
        if self.parts.looks_back:
            arrays["places"][:] = [range(first, first + before + 1) for first in places]
        self._session.run_with_iobinding(bound.binding)
        return list(zip(bound.tokens.T.tolist(), bound.chances.T.tolist(), strict=True))

    def _bind(self, rows: int, before: int) -> _Bound:
        """Return inputs and outputs of passes of a shape, but for those of `_bind_memory`."""
        steps, width = self.steps, self.parts.step.layers[0].width
        inputs = {
            "last": torch.zeros(steps, rows, dtype=torch.int32),
            "total": torch.zeros(steps, dtype=torch.int32),
            "place": torch.zeros(steps, rows, 1, dtype=torch.long),
            "places": torch.zeros(rows, before + 1, dtype=torch.long),
        }
        arrays = {name: one.numpy() for name, one in inputs.items()}
        arrays["place"] = arrays["place"][:, :, 0]
        bound = _Bound(
            self._session.io_binding(),
            inputs,
            arrays,
            x=torch.zeros(rows, 1, width),
            behind=torch.zeros(rows, before, width),
            scale=torch.ones(rows, 1, 1),
            noise=torch.zeros(steps, rows, 1, len(self.parts.tokens)),
            tokens=torch.zeros(rows, steps, dtype=torch.long),
            chances=torch.zeros(rows, steps),
        )
        for name in ("last", "total", "place"):
            inputs |= {f"{name}{step}": own for step, own in enumerate(inputs.pop(name))}
        if self.draws:
            inputs |= {f"noise{step}": own for step, own in enumerate(bound.noise)}
            inputs["scale"] = bound.scale
        if self.parts.looks_back:
            inputs |= {"behind": bound.behind, "kept": torch.tensor([before])}
        else:
            del inputs["places"]
        inputs["x"] = bound.x
        for name, tensor in inputs.items():
            bind(bound.binding.bind_input, name, tensor)
        bind(bound.binding.bind_output, "tokens", bound.tokens)
        bind(bound.binding.bind_output, "chances", bound.chances)
        return bound

    def _bind_memory(self, bound: _Bound, given: PassInputs) -> None:
        """Bind keys and values as inputs, and the same memory as outputs; and tables as long."""
        caches, rows, where, _ = given.lent
        whole = given.by_position
        memory = where, rows.start, rows.stop, *(given.tables if whole else ())
        if memory == bound.memory:
            return
        capacity = caches[0].shape[2]
        for number, cache in enumerate(caches):
            bind(bound.binding.bind_input, f"cached{number}", cache[rows])
            for step in range(self.steps):
                bind(bound.binding.bind_output, f"written{number}_{step}", cache[rows])
        for name, values in given.rotations.items():
            table = values
            if not whole:
                # It may have more positions than these, and has to have as many as the cache.
                needed = max(capacity, len(bound.behind) * values.shape[1])
                table = bound.tables[name] = values.new_zeros(needed, values.shape[-1])
            bind(bound.binding.bind_input, name, table)
        bound.memory = memory
