"""Several draft steps as one graph for ONNX Runtime, each with the token of the one before.

Of a small model most of a draft step is what calls it: embedding, tables, the reading of the best
token. In one graph a step takes a third. Its weights have 8 bits, whatever the target's have: a
draft need not round as anything else does, as a verify computes all layers of its positions anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from fastvlm.functional.threads import usual_threads
from fastvlm.language.draft_path import DraftPath, Draws
from fastvlm.runtimes.attention_graph import ROTATED_AT_ONCE, Attention, settings_of
from fastvlm.runtimes.draft_graph import DraftLayers, DraftPass, add_draft
from fastvlm.runtimes.layer_form import GraphLayer
from fastvlm.runtimes.layer_pass import PassInputs, bind
from fastvlm.runtimes.onnx_graph import OnnxGraph
from fastvlm.runtimes.quantised_weights import BITS


class ChainParts(NamedTuple):
    """What a chain of draft steps computes.

    Args:
        step: Each step.
        embedding: The rows of all tokens: (vocabulary, d_model).
        tokens: Those that can be drafted, as the head's rows stand for them: (tokens,).
    """

    step: DraftLayers
    embedding: Tensor
    tokens: Tensor

    @property
    def is_known(self) -> bool:
        """Whether attention can rotate as the layers do."""
        return not any(layer.rotation.size % (2 * ROTATED_AT_ONCE) for layer in self.step.layers)


class ChainedAttention(Attention):
    """Attention of one row's steps, a position each, that follow one another.

    Inputs of a pass, for each step n:

        last{n}: Its position: (1,).
        total{n}: How many positions there are then: ().
        place{n}: Where the tables of rotations have it: (1, 1).

    All steps read and write `cached{m}`, the keys of layer m / 2, and values with an odd number:
    (1, kv_heads, capacity, head_dim). `written{m}_{n}` is the same memory. A step begins with the
    token of the one before, and so not before that has written.
    """

    def __init__(self, graph: OnnxGraph, layers: Sequence[GraphLayer], steps: int) -> None:
        super().__init__(graph)
        self.step = 0
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
        self.step, self.cached = step, 0

    def attend(self, layer: GraphLayer, qkv: str) -> str:
        """Return what a layer's heads read. See `Attention.attend`."""
        graph, form, step = self.graph, layer.form.attention, self.step
        normed = form.q_norm is not None or form.k_norm is not None
        heads = [*self.split(form, qkv)] if normed else [qkv, "", ""]
        numbers = self.cached, self.cached + 1
        self.cached += 2
        written = [graph.output(f"written{number}_{step}", None) for number in numbers]
        inputs = [*heads, *(f"cached{number}" for number in numbers), f"last{step}", f"total{step}"]
        inputs += [*layer.rotation.tables, f"place{step}"]
        name = f"attention{numbers[0]}_{step}"
        settings = {"do_rotary": 1, "rotary_interleaved": int(layer.rotation.interleaved)}
        graph.add("GroupQueryAttention", inputs, [name, *written], **settings, **settings_of(layer))
        return name


@usual_threads()
def chain_graph(parts: ChainParts, steps: int, *, draws: bool) -> OnnxGraph:
    """Return the graph from a token, `token`, to that of each step, and how likely it is.

    They are `tokens` and `chances`: (1, steps) each.

    Args:
        parts: What each step computes.
        steps: How many.
        draws: Whether a step's token is the best one after its logits were multiplied by `scale`,
            (), and `noise{n}` was added to those of step n, (1, 1, tokens).
    """
    graph = OnnxGraph(BITS["int8"])
    layers = parts.step.layers
    attention = ChainedAttention(graph, layers, steps)
    # With sizes that are known, the cache would be taken to be as long as what a step adds.
    token = graph.input("token", TensorProto.INT64, ["batch", "width"])
    embedding, tokens = graph.weight(parts.embedding), graph.weight(parts.tokens)
    scale, last = "", graph.constant(-1)
    if draws:
        scale = graph.input("scale", TensorProto.FLOAT, [])
    found, chances = [], []
    for number in range(steps):
        attention.begin(number)
        logits = add_draft(graph, parts.step, attention, graph.add("Gather", [embedding, token]))
        scores = logits
        if draws:
            logits = graph.add("Mul", [logits, scale])
            noise = graph.input(f"noise{number}", TensorProto.FLOAT, None)
            scores = graph.add("Add", [logits, noise])
        best = graph.add("ArgMax", [scores], axis=-1)
        likely = graph.add("Softmax", [logits], axis=-1)
        chance = graph.add("GatherElements", [likely, best], axis=-1)
        chances.append(graph.add("Squeeze", [chance, last]))
        best = graph.add("Squeeze", [best, last])
        token = graph.add("Gather", [tokens, best])
        found.append(token)
    for name, made, dtype in (
        ("tokens", found, TensorProto.INT64),
        ("chances", chances, TensorProto.FLOAT),
    ):
        graph.add("Concat", made, [name], axis=1)
        graph.outputs.append(helper.make_tensor_value_info(name, dtype, ["batch", "steps"]))
    return graph


class DraftChain:
    """Some draft steps, ready to run.

    Args:
        parts: What each step computes.
        steps: How many.
        draws: Whether they draw their tokens.
    """

    def __init__(self, parts: ChainParts, steps: int, *, draws: bool) -> None:
        self.steps = steps
        self._layers = parts.step.layers
        # What is bound stays here: the session reads and writes it where it lies.
        self._session, self._weights = chain_graph(parts, steps, draws=draws).session()
        self._binding = self._session.io_binding()
        self._token = torch.zeros(1, 1, dtype=torch.long)
        self._ends = torch.zeros(2, steps, dtype=torch.int32)
        self._places = torch.arange(steps)[:, None, None].contiguous()
        self._tables: dict[str, Tensor] = {}
        self._found = torch.zeros(1, steps, dtype=torch.long), torch.zeros(1, steps)
        self._memory: tuple[int, ...] = ()
        bind_input = self._binding.bind_input
        bind(bind_input, "token", self._token)
        for number in range(steps):
            bind(bind_input, f"last{number}", self._ends[0, number : number + 1])
            bind(bind_input, f"total{number}", self._ends[1, number])
            bind(bind_input, f"place{number}", self._places[number])
        self._scale = torch.ones(())
        self._noise = torch.zeros(steps, 1, 1, len(parts.tokens))
        if draws:
            bind(bind_input, "scale", self._scale)
            for number in range(steps):
                bind(bind_input, f"noise{number}", self._noise[number])
        for name, tensor in zip(("tokens", "chances"), self._found, strict=True):
            bind(self._binding.bind_output, name, tensor)

    @torch.inference_mode()
    def run(
        self, token: int, given: PassInputs, draws: Draws | None = None
    ) -> list[tuple[int, float]]:
        """Return each step's token, and its probability.

        Args:
            token: What stands at the first position.
            given: The first position, rotations of all, and the cache.
            draws: How tokens are drawn, if they are.
        """
        if draws is not None:
            self._scale.fill_(1 / draws.temperature)
            self._noise[:, 0, 0] = draws.noise
        self._bind_memory(given)
        for name, values in given.rotations.items():
            self._tables[name][: self.steps] = values[0]
        [start] = given.starts
        self._token.fill_(token)
        torch.arange(start, start + self.steps, out=self._ends[0])
        torch.add(self._ends[0], 1, out=self._ends[1])
        self._session.run_with_iobinding(self._binding)
        tokens, chances = self._found
        return list(zip(tokens[0].tolist(), chances[0].tolist(), strict=True))

    def _bind_memory(self, given: PassInputs) -> None:
        """Bind keys and values as inputs, and the same memory as outputs; and tables as long."""
        rows, caches = given.rows, given.caches
        capacity = caches[0].shape[2]
        memory = (rows.start, rows.stop, capacity, *map(Tensor.data_ptr, caches))
        if memory == self._memory:
            return
        for number, cache in enumerate(caches):
            bind(self._binding.bind_input, f"cached{number}", cache[rows])
            for step in range(self.steps):
                bind(self._binding.bind_output, f"written{number}_{step}", cache[rows])
        for name, values in given.rotations.items():
            self._tables[name] = values.new_zeros(capacity, values.shape[-1])
            bind(self._binding.bind_input, name, self._tables[name])
        self._memory = memory


def chain_of(
    fused: DraftPass, embedding: Any, path: DraftPath, kind: tuple[int, bool]
) -> DraftChain | None:
    """Return some draft steps in one graph, made once; None where they are run one by one.

    Args:
        fused: Each step.
        embedding: The module that embeds tokens.
        path: What is drafted.
        kind: How many, and whether they draw their tokens.
    """
    # A module of another class does more than looking rows up.
    if path.tokens is None or type(embedding) is not nn.Embedding:
        return None
    if kind not in fused.chains:
        parts = ChainParts(fused.step, embedding.weight, path.tokens)
        chain = DraftChain(parts, kind[0], draws=kind[1]) if parts.is_known else None
        fused.chains[kind] = chain
    found: DraftChain | None = fused.chains[kind]
    return found
