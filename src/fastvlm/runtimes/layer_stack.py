"""Layers that are run by ONNX Runtime in as few graphs as passes allow."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlm.language.cache import DecoderCache
from fastvlm.language.masks import MaskKind, additive
from fastvlm.language.positions import Positions
from fastvlm.runtimes.attention_graph import PassKind
from fastvlm.runtimes.graph_parts import Head
from fastvlm.runtimes.layer_form import GraphLayer
from fastvlm.runtimes.layer_graph import layers_graph
from fastvlm.runtimes.layer_pass import LayerPass, PassInputs
from fastvlm.runtimes.lent_rows import lend_rows

LARGEST = 2**24
"""Weights of which there may be several copies, each in a graph of its own: of more, reading them
takes so long that the calls don't count."""
MOST_GRAPHS = 8
"""Graphs of a stack whose layers may be in several."""


class StackPass(NamedTuple):
    """What the layers of a pass are given beside hidden states.

    Args:
        positions: The positions.
        cache: Where the layers keep their keys and values.
        rotations: See `PassInputs`; those that some of the layers take.
    """

    positions: Positions
    cache: DecoderCache
    rotations: Mapping[str, Tensor]


class _Key(NamedTuple):
    """What tells a graph from others, see `layers_graph`."""

    layers: tuple[int, ...]
    exit_layer: int
    kind: PassKind
    logits: bool
    tokens: bool


class _Segment(NamedTuple):
    """Layers in one graph: what runs them, where each caches, and what it takes."""

    layers: LayerPass
    caches: list[tuple[int, Tensor]]
    """Each layer's number in the cache, and no keys of its shape: (1, kv_heads, 0, head_dim)."""
    rotations: list[str]


class LayerStack:
    """Layers, in graphs that are made when they are first run.

    Each choice of layers that passes run is one graph, as each graph costs a call; of these there
    are a few (`MOST_GRAPHS`). Where that takes too much memory each layer is in one graph, so that
    its weights are packed once: where a pass begins or ends amid a graph's layers, as at a draft's
    exit layer, that graph is replaced by two from then on.

    Args:
        masks: What each layer sees.
        read: Returns a layer, by its number.
        bits: Bits of the weights, see `OnnxGraph`.
        copied: Whether layers may be in several graphs.
        head: Returns what makes logits of the last layer's states; None for a stack without.
        embedding: Returns the rows of all tokens, where passes may begin with tokens.
    """

    def __init__(
        self,
        masks: Sequence[MaskKind],
        read: Callable[[int], GraphLayer],
        bits: int | None,
        *,
        copied: bool,
        head: Callable[[], Head] | None = None,
        embedding: Callable[[], Tensor] | None = None,
    ) -> None:
        self.masks, self.read, self.bits, self.copied = masks, read, bits, copied
        self.head, self.embedding = head, embedding
        self._cuts = {0, len(masks)}
        self._segments: dict[_Key, _Segment] = {}

    def run(self, x: Tensor, layers: Sequence[int], given: StackPass) -> Tensor:
        """Run some layers, in their order: (batch, width, d_model) to the same."""
        for part in [tuple(layers)] if self.copied else self._apart(layers):
            [x] = self._run_segment(x, part, given)
        return x

    def run_all(
        self,
        x: Tensor | Sequence[Sequence[int]],
        exit_layer: int,
        given: StackPass,
        *,
        logits: bool,
    ) -> list[Tensor]:
        """Run all layers, in one graph.

        Args:
            x: Hidden states, (batch, width, d_model), or tokens, equally many in each row.
            exit_layer: After how many layers states are returned too; 0 for none.
            given: The pass.
            logits: Whether to make logits of the last states.

        Returns:
            The states of the exit layer, if there is one, and the last ones, or logits.
        """
        layers = tuple(range(len(self.masks)))
        return self._run_segment(x, layers, given, exit_layer, logits=logits)

    def _apart(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        """Return layers as those of graphs that have none in common, cut where they must be."""
        found = []
        for first, end in ranges(layers):
            for place in (first, end):
                if place not in self._cuts:
                    self._cuts.add(place)
                    keys = [*self._segments]
                    for key in keys:
                        if key.layers[0] < place <= key.layers[-1]:
                            del self._segments[key]
            cuts = sorted(cut for cut in self._cuts if first <= cut <= end)
            found += [tuple(range(start, stop)) for start, stop in pairwise(cuts)]
        return found

    def _run_segment(
        self,
        x: Tensor | Sequence[Sequence[int]],
        layers: tuple[int, ...],
        given: StackPass,
        exit_layer: int = 0,
        *,
        logits: bool = False,
    ) -> list[Tensor]:
        positions = given.positions
        kinds = list(dict.fromkeys(self.masks[number] for number in layers))
        masked = needs_mask(positions, kinds)
        masks = {}
        if masked:
            masks = {
                f"mask{number}": additive(positions.visible(kind), torch.float32)[:, None]
                for number, kind in enumerate(kinds)
            }
        # Where weights may be copied, one row has a graph of its own, of fewer operators.
        alone = self.copied and len(positions.slots) == 1
        sort: PassKind = "masked" if masked else "single" if alone else "batched"
        tokens = not isinstance(x, Tensor)
        segment = self._segment(_Key(layers, exit_layer, sort, logits, tokens))
        rotations = {name: given.rotations[name] for name in segment.rotations}
        lent = lend_rows(given.cache, positions, segment.caches)
        made = segment.layers.run(x, PassInputs(positions.starts, rotations, lent, masks))
        lent.write_back()
        return made

    def _segment(self, key: _Key) -> _Segment:
        """Return layers in one graph, made when it is first run."""
        if key in self._segments:
            # What is run stays: the first one is the one that was not run for longest.
            self._segments[key] = self._segments.pop(key)
        else:
            if self.copied and len(self._segments) == MOST_GRAPHS:
                del self._segments[next(iter(self._segments))]
            read = [self.read(number) for number in key.layers]
            head = None
            if key.logits:
                assert self.head is not None  # only the target's stack is asked for logits
                head = self.head()
            rows = None
            if key.tokens:
                assert self.embedding is not None  # nor for passes that begin with tokens
                rows = self.embedding()
            graph = layers_graph(
                read, self.bits, key.kind, exit_layer=key.exit_layer, head=head, embedding=rows
            )
            outputs = {"exit": read[0].width} if key.exit_layer else {}
            outputs["y"] = read[0].width if head is None else len(head.product.weight)
            self._segments[key] = _Segment(
                LayerPass(graph, key.kind, outputs),
                cached_layers(read),
                rotations_of(read),
            )
        return self._segments[key]


def ranges(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Return layers as ranges: first and end."""
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and found[-1][1] == layer:
            found[-1] = found[-1][0], layer + 1
        else:
            found.append((layer, layer + 1))
    return found


def split_after(layers: Sequence[int], ends: Container[int]) -> list[list[int]]:
    """Return layers in parts that end where one of some layers comes."""
    found: list[list[int]] = []
    for layer in layers:
        if not found or found[-1][-1] in ends:
            found.append([])
        found[-1].append(layer)
    return found


def cached_layers(layers: Sequence[GraphLayer]) -> list[tuple[int, Tensor]]:
    """Return each layer's number in the cache, and no keys of its shape."""
    forms = [layer.form.attention for layer in layers]
    return [(form.cache_index, torch.empty(1, form.kv_heads, 0, form.head_dim)) for form in forms]


def rotations_of(layers: Sequence[GraphLayer]) -> list[str]:
    """Return the names of the rotations that layers take, see `PassInputs`."""
    rotations = dict.fromkeys(layer.rotation for layer in layers)
    return [table for rotation in rotations for table in rotation.tables]


def needs_mask(positions: Positions, kinds: Sequence[MaskKind]) -> bool:
    """Return whether a pass sees other than all positions before its own, or a window of them."""
    if positions.blocks is not None:
        return True
    return any(not kind._replace(window=None).is_whole(positions.end) for kind in kinds)
