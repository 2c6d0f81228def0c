"""Layers that follow one another, run by ONNX Runtime in as few graphs as passes allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import additive
from fastvlm.language.masks import MaskKind
from fastvlm.language.positions import Positions
from fastvlm.runtimes.layer_form import AttentionForm
from fastvlm.runtimes.layer_graph import GraphLayer, layers_graph
from fastvlm.runtimes.layer_pass import LayerPass, PassInputs


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
    """Layers, each of which is in one graph, so that its weights are packed once.

    Where a pass begins or ends amid a graph's layers, as at a draft's exit layer, that graph is
    replaced by two from then on.

    Args:
        masks: What each layer sees.
        read: Returns a layer, by its number.
        bits: Bits of the weights, see `OnnxGraph`.
    """

    def __init__(
        self, masks: Sequence[MaskKind], read: Callable[[int], GraphLayer], bits: int | None
    ) -> None:
        self.masks, self.read, self.bits = masks, read, bits
        self._cuts = {0, len(masks)}
        self._segments: dict[tuple[int, int, bool], _Segment] = {}

    def run(self, x: Tensor, first: int, end: int, given: StackPass) -> Tensor:
        """Run layers from the first to before the end: (batch, width, d_model) to the same."""
        for place in (first, end):
            if place not in self._cuts:
                self._cuts.add(place)
                for key in [key for key in self._segments if key[0] < place < key[1]]:
                    del self._segments[key]
        for start, stop in pairwise(sorted(cut for cut in self._cuts if first <= cut <= end)):
            x = self._run_segment(x, start, stop, given)
        return x

    def _run_segment(self, x: Tensor, first: int, end: int, given: StackPass) -> Tensor:
        positions = given.positions
        kinds = list(dict.fromkeys(self.masks[first:end]))
        masked = _needs_mask(positions, kinds)
        masks = None
        if masked:
            masks = {
                f"mask{number}": additive(positions.visible(kind), x.dtype)[:, None]
                for number, kind in enumerate(kinds)
            }
        segment = self._segment(first, end, masked=masked)
        rotations = {name: given.rotations[name] for name in segment.rotations}
        caches, write_back = lend_rows(given.cache, positions, segment.caches)
        x = segment.layers.run(x, PassInputs(positions.starts, rotations, caches, masks))
        write_back()
        return x

    def _segment(self, first: int, end: int, *, masked: bool) -> _Segment:
        """Return layers in one graph, made when it is first run."""
        key = first, end, masked
        if key not in self._segments:
            layers = [self.read(number) for number in range(first, end)]
            graph = layers_graph(layers, self.bits, masked=masked)
            numbers = sorted({layer.rotation.number for layer in layers})
            self._segments[key] = _Segment(
                LayerPass(graph, torch.get_num_threads()),
                [_cached(layer.form.attention) for layer in layers],
                [f"{name}{number}" for number in numbers for name in ("cos", "sin")],
            )
        return self._segments[key]


def _cached(form: AttentionForm) -> tuple[int, Tensor]:
    return form.cache_index, torch.empty(1, form.kv_heads, 0, form.head_dim)


def _needs_mask(positions: Positions, kinds: Sequence[MaskKind]) -> bool:
    """Return whether a pass sees other than all positions before its own, or a window of them."""
    if positions.blocks is not None:
        return True
    return any(not kind._replace(window=None).is_whole(positions.end) for kind in kinds)


def lend_rows(
    cache: DecoderCache, positions: Positions, layers: Sequence[tuple[int, Tensor]]
) -> tuple[list[Tensor], Callable[[], None]]:
    """Return where the layers of a pass read and write, and what must be called after it.

    Rows that lie side by side are lent where they are; others are copied, and what is written to
    the copies is then written back.

    Args:
        cache: The cache.
        positions: Of the pass.
        layers: Each layer's number in the cache, and keys of its shape.

    Returns:
        Keys and values by turns, (batch, kv_heads, capacity, head_dim) each, contiguous.
    """
    cache.begin_pass(positions)
    rows = cache.rows
    own: list[Tensor] = []
    for number, like in layers:
        storage = cache.storage(number, like, like)
        storage.make_finite(positions)
        own += storage.keys, storage.values
    lent = [tensor[rows] for tensor in own]

    def write_back() -> None:
        if type(rows) is slice:
            return
        index, places = positions.rows(cache.device), positions.indices
        each = torch.arange(len(index))[:, None]
        for tensor, copied in zip(own, lent, strict=True):
            tensor[index, :, places] = copied[each, :, places]

    return lent, write_back
