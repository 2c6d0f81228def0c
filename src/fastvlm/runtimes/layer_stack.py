"""Layers that are run by ONNX Runtime in as few graphs as passes allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlm.language.cache import DecoderCache
from fastvlm.language.masks import MaskKind, additive
from fastvlm.language.positions import Positions
from fastvlm.runtimes.layer_graph import GraphLayer, layers_graph
from fastvlm.runtimes.layer_pass import LayerPass, PassInputs

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
    """

    def __init__(
        self,
        masks: Sequence[MaskKind],
        read: Callable[[int], GraphLayer],
        bits: int | None,
        *,
        copied: bool,
    ) -> None:
        self.masks, self.read, self.bits, self.copied = masks, read, bits, copied
        self._cuts = {0, len(masks)}
        self._segments: dict[tuple[tuple[int, ...], int | None, bool], _Segment] = {}

    def run(self, x: Tensor, layers: Sequence[int], given: StackPass) -> Tensor:
        """Run some layers, in their order: (batch, width, d_model) to the same."""
        for part in [tuple(layers)] if self.copied else self._apart(layers):
            [x] = self._run_segment(x, part, given)
        return x

    def run_with_exit(self, x: Tensor, exit_layer: int, given: StackPass) -> tuple[Tensor, Tensor]:
        """Run all layers, in one graph; return the states after some of them, and the last."""
        layers = tuple(range(len(self.masks)))
        exits, last = self._run_segment(x, layers, given, exit_layer)
        return exits, last

    def _apart(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        """Return layers as those of graphs that have none in common, cut where they must be."""
        found = []
        for first, end in ranges(layers):
            for place in (first, end):
                if place not in self._cuts:
                    self._cuts.add(place)
                    for key in [key for key in self._segments if key[0][0] < place <= key[0][-1]]:
                        del self._segments[key]
            cuts = sorted(cut for cut in self._cuts if first <= cut <= end)
            found += [tuple(range(start, stop)) for start, stop in pairwise(cuts)]
        return found

    def _run_segment(
        self,
        x: Tensor,
        layers: tuple[int, ...],
        given: StackPass,
        exit_layer: int | None = None,
    ) -> list[Tensor]:
        positions = given.positions
        kinds = list(dict.fromkeys(self.masks[number] for number in layers))
        masked = needs_mask(positions, kinds)
        masks = None
        if masked:
            masks = {
                f"mask{number}": additive(positions.visible(kind), x.dtype)[:, None]
                for number, kind in enumerate(kinds)
            }
        segment = self._segment(layers, exit_layer, masked=masked)
        rotations = {name: given.rotations[name] for name in segment.rotations}
        lent = lend_rows(given.cache, positions, segment.caches)
        inputs = PassInputs(positions.starts, rotations, lent.caches, lent.rows, masks)
        made = segment.layers.run(x, inputs)
        lent.write_back()
        return made

    def _segment(
        self, layers: tuple[int, ...], exit_layer: int | None, *, masked: bool
    ) -> _Segment:
        """Return layers in one graph, made when it is first run."""
        key = layers, exit_layer, masked
        if key in self._segments:
            # What is run stays: the first one is the one that was not run for longest.
            self._segments[key] = self._segments.pop(key)
        else:
            if self.copied and len(self._segments) == MOST_GRAPHS:
                del self._segments[next(iter(self._segments))]
            read = [self.read(number) for number in layers]
            graph = layers_graph(read, self.bits, masked=masked, exit_layer=exit_layer)
            names = ["y"] if exit_layer is None else ["exit", "y"]
            outputs = dict.fromkeys(names, read[0].width)
            self._segments[key] = _Segment(
                LayerPass(graph, torch.get_num_threads(), outputs),
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


def cached_layers(layers: Sequence[GraphLayer]) -> list[tuple[int, Tensor]]:
    """Return each layer's number in the cache, and no keys of its shape."""
    forms = [layer.form.attention for layer in layers]
    return [(form.cache_index, torch.empty(1, form.kv_heads, 0, form.head_dim)) for form in forms]


def rotations_of(layers: Sequence[GraphLayer]) -> list[str]:
    """Return the names of the rotations that layers take, see `PassInputs`."""
    numbers = sorted({layer.rotation.number for layer in layers})
    return [f"{name}{number}" for number in numbers for name in ("cos", "sin")]


def needs_mask(positions: Positions, kinds: Sequence[MaskKind]) -> bool:
    """Return whether a pass sees other than all positions before its own, or a window of them."""
    if positions.blocks is not None:
        return True
    return any(not kind._replace(window=None).is_whole(positions.end) for kind in kinds)


class Lent(NamedTuple):
    """Where the layers of a pass read and write. See `PassInputs`."""

    caches: list[Tensor]
    rows: slice
    write_back: Callable[[], None]
    """What must be called after the pass."""


def lend_rows(
    cache: DecoderCache, positions: Positions, layers: Sequence[tuple[int, Tensor]]
) -> Lent:
    """Lend layers what a pass reads and writes of a cache.

    Rows that lie side by side are lent where they are; others are copied, and what is written to
    the copies is then written back.

    Args:
        cache: The cache.
        positions: Of the pass.
        layers: Each layer's number in the cache, and keys of its shape.
    """
    cache.begin_pass(positions)
    rows = cache.rows
    own: list[Tensor] = []
    for number, like in layers:
        storage = cache.layers.get(number) or cache.storage(number, like, like)
        storage.make_finite(positions)
        own += storage.keys, storage.values
    if type(rows) is slice:
        return Lent(own, rows, _nothing)
    copies = [tensor[rows] for tensor in own]

    def write_back() -> None:
        index, places = positions.rows(cache.device), positions.indices
        each = torch.arange(len(index))[:, None]
        for tensor, copied in zip(own, copies, strict=True):
            tensor[index, :, places] = copied[each, :, places]

    return Lent(copies, slice(0, len(positions.slots)), write_back)


def _nothing() -> None:
    pass
