"""Draft steps in ONNX Runtime, for a decoder of any runtime."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fastvlm.language.cache import DecoderCache, KeyValueCache
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.draft_path import DraftPath, Draws
from fastvlm.language.positions import Positions
from fastvlm.language.weights_state import identities, weights_state
from fastvlm.runtimes.decoder_forms import DecoderForms
from fastvlm.runtimes.draft_chain import ALONE, ChainKind, ChainParts, DraftChain
from fastvlm.runtimes.draft_graph import DraftLayers, DraftPass, mlp_form
from fastvlm.runtimes.draft_size import is_small
from fastvlm.runtimes.layer_pass import PassInputs
from fastvlm.runtimes.layer_stack import LARGEST, needs_mask
from fastvlm.runtimes.lent_rows import lend_rows
from fastvlm.runtimes.onnx_graph import OnnxGraph
from fastvlm.runtimes.quantised_weights import BITS, QuantisedMatrices

COMPUTES = torch.float32, torch.bfloat16, torch.float16
"""The precisions of decoders, on a CPU, that it drafts for. It computes in float32 itself."""
FIRST, FURTHER = 2, 4
"""Steps of a small draft that are worth a call, to begin with and to go on."""
MAX_DRAFTS = 8
"""Drafts whose graphs are kept at once."""


@dataclass(slots=True)
class _Kept:
    """What is made of a draft.

    Args:
        path: What it runs. It stays, so that nothing else comes to lie where it does.
        step: A step; None where graphs gain nothing.
        parts: What several steps in one graph compute; None where they are run one by one.
        chains: Several steps in one graph, by their kinds.
    """

    path: DraftPath
    step: DraftPass | None = None
    parts: ChainParts | None = None
    chains: dict[ChainKind, DraftChain] = field(default_factory=dict)


class DraftRunner:
    """Runs draft steps as graphs of ONNX Runtime, on a decoder's own cache. See `DraftsAhead`.

    What several steps compute in one graph rounds otherwise than the decoder does: a verify has to
    compute all layers of their positions anew.

    Args:
        forms: The decoder.
        bits: Bits of the weights of a single step, see `OnnxGraph`.
    """

    def __init__(self, forms: DecoderForms, bits: int | None = None) -> None:
        self.forms, self.bits = forms, bits
        self._turn = RLock()
        self._kept: dict[Hashable, _Kept] = {}
        self._state: Hashable = None
        self._computes = True

    @property
    def prepared(self) -> int:
        """How often a pass has made a graph. See `SplitDecoder.prepared`."""
        return OnnxGraph.sessions

    def follow(self, weights: Hashable = None) -> None:
        """Forget what was made of weights that have changed since. See `SplitDecoder.follow`.

        Args:
            weights: The decoder's `weights_state`, where it is known.
        """
        with self._turn:
            self._computes = drafts_for(self.forms.split)
            if self._kept and (not self._computes or self._state != self._found_state(weights)):
                self.forget()

    def forget(self) -> None:
        """Make all graphs anew where they are next needed."""
        with self._turn:
            self._kept.clear()
            self.forms.rotations.forget()

    def step(
        self, x: Tensor, positions: Positions, cache: DecoderCache, path: DraftPath
    ) -> tuple[Tensor, Tensor] | None:
        """Run a draft step in one graph, in the decoder's precision.

        Returns:
            See `SplitDecoder.draft_step`, the logits as the LM head makes them; None where it gains
            nothing.
        """
        with self._turn:
            step = self._of(path).step
            if step is None or step.step.size > LARGEST or needs_mask(positions, step.masks):
                return None
            x = self.forms.split.enter(x, positions)
            given = self._inputs(step, positions, cache)
            exits, logits = step.run(x, given)
            given.lent.write_back()
        return exits, logits

    def least(self, path: DraftPath, drafted: int) -> int:
        """Return how many steps are worth a call. See `DraftsAhead.least`.

        A call takes as long as some steps of a small draft.
        """
        if not self._computes:
            return 1
        with self._turn:
            step = self._of(path).step
        if step is None or step.step.size > ALONE:
            return 1
        return FURTHER if drafted else FIRST

    def draft_ahead(
        self,
        tokens: Sequence[int],
        positions: Positions,
        cache: KeyValueCache,
        path: DraftPath,
        behind: Tensor | None = None,
        draws: Draws | None = None,
    ) -> list[tuple[list[int], list[float]]] | None:
        """Run several draft steps in one graph. See `DraftsAhead.draft_ahead`."""
        if positions.injects or not self._decodes(cache):
            return None
        with self._turn:
            kept = self._of(path)
            step, parts = kept.step, kept.parts
            if step is None or parts is None or needs_mask(positions, step.masks):
                return None
            steps = positions.width - (0 if behind is None else behind.shape[1])
            kind = ChainKind(steps, draws is not None, len(tokens) > 1)
            if kind not in kept.chains:
                kept.chains[kind] = DraftChain(parts, kind)
            x = self._entered(torch.tensor(tokens)[:, None], positions)
            given = self._inputs(step, positions, cache)
            found = kept.chains[kind].run(x, given, behind, draws)
            given.lent.write_back()
        return found

    def _of(self, path: DraftPath) -> _Kept:
        """Return what is made of a draft."""
        rows = path.rows
        if rows is None:
            return _Kept(path)
        key = path.exit_layer, tuple(map(id, path.blocks)), id(path.mlp), rows.data_ptr(), len(rows)
        if key not in self._kept:
            if len(self._kept) == MAX_DRAFTS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._made(path, rows)
            self._state = self._found_state()
        return self._kept[key]

    def _made(self, path: DraftPath, rows: Tensor) -> _Kept:
        forms = self.forms
        if not is_small(forms.split, path):
            return _Kept(path)
        layers = [forms.layer(number) for number in range(path.exit_layer)]
        layers += map(forms.block_reader(path.blocks), range(len(path.blocks)))
        mlp = None if path.mlp is None else mlp_form(path.mlp)
        step = DraftLayers(layers, path.exit_layer, mlp, forms.head(rows))
        parts = None
        if path.tokens is not None and forms.split.first_entry() is None:
            whole = Positions.whole([len(path.tokens)], path.tokens.device)
            embedded = self._entered(path.tokens[None], whole)[0].detach().float()
            matrices = QuantisedMatrices(BITS["int8"])
            parts = ChainParts(step, path.tokens, embedded, matrices)
        known = parts is not None and parts.is_known
        return _Kept(path, DraftPass(step, self.bits), parts if known else None)

    def _entered(self, tokens: Tensor, positions: Positions) -> Tensor:
        """Return what enters the first layer of tokens, (batch, new), wherever they stand."""
        split = self.forms.split
        return split.enter(split.embed(tokens), positions)

    def _inputs(self, step: DraftPass, places: Positions, cache: DecoderCache) -> PassInputs:
        rotations = self.forms.rotations.of(places, cache.capacity)
        own = {name: rotations[name] for name in step.rotations}
        lent = lend_rows(cache, places, step.caches, self.forms.split.dtype)
        return PassInputs(places.starts, own, lent)

    def _decodes(self, cache: KeyValueCache) -> TypeGuard[DecoderCache]:
        computes = self._computes and not torch.is_grad_enabled()
        return computes and isinstance(cache, DecoderCache)

    def _found_state(self, weights: Hashable = None) -> Hashable:
        """Return what changes whenever something does that graphs are made of."""
        modules: list[nn.Module] = []
        for kept in self._kept.values():
            modules += kept.path.blocks if kept.path.mlp is None else [kept.path.mlp]
        own = [weight for one in dict.fromkeys(modules) for weight in one.parameters()]
        split = self.forms.split
        found = weights_state(split.model) if weights is None else weights
        return found, identities(own), self.forms.rotations.state


def drafts_for(split: SplitDecoder) -> bool:
    """Return whether a `DraftRunner` drafts for a decoder where it is, in its precision."""
    device, dtype = split.device_and_dtype()
    return device.type == "cpu" and dtype in COMPUTES
