"""Which layers to skip when drafting: a search on sample requests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm.decoding.engine import Engine
from fastvlm.decoding.request import Request
from fastvlm.functional.best import best_columns
from fastvlm.functional.errors import InputError
from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.masks import FULL, MaskKind
from fastvlm.language.positions import Positions

MAX_DRAFT_TOKENS = 24
MAX_EVALUATIONS = 600
TIMING_ROUNDS = 7


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The time that each part of decoding takes, all in the same unit.

    Args:
        layer: One layer, for one token.
        head: Embedding and LM head, for one token.
        verify: A pass of all layers over two tokens.
        slope: What each further token adds to such a pass.
    """

    layer: float
    head: float
    verify: float
    slope: float


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """Layers to skip, and their expected effect.

    Args:
        skipped: The layers' indices.
        acceptance: The share of drafted tokens that equal the target's own.
        speedup: Expected tokens per second over those of ordinary decoding.
    """

    skipped: tuple[int, ...]
    acceptance: float
    speedup: float


class ContextCache:
    """The target's keys and values of a whole reply, with each position's own beside them.

    Args:
        cache: A cache whose only slot holds the reply.
        length: Positions of the reply.
    """

    def __init__(self, cache: DecoderCache, length: int) -> None:
        self.start = 0
        # Layers that attend to an image alone keep nothing here.
        self.keys = {index: layer.keys[:, :, :length] for index, layer in cache.layers.items()}
        self.values = {index: layer.values[:, :, :length] for index, layer in cache.layers.items()}

    def begin_pass(self, positions: Positions) -> None:
        """Note where the pass begins: the cache is read-only."""
        self.start = min(positions.starts)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (as transformers has it)
        """Return the first position of the pass."""
        return self.start

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the target's keys and values followed by the new ones.

        Args:
            keys: (1, kv_heads, width, head_dim).
            values: (1, kv_heads, width, head_dim).
            layer_idx: The layer's index.

        Returns:
            Keys and values, (1, kv_heads, length + width, head_dim) each.
        """
        return (
            torch.cat((self.keys[layer_idx], keys), 2),
            torch.cat((self.values[layer_idx], values), 2),
        )


class FirstDraftPositions(Positions):
    """Positions that each attend to the target's keys before them and to their own new key."""

    def mask(self, kind: MaskKind = FULL) -> Tensor:
        """Return which keys each position sees: (1, 1, width, end + width)."""
        return self.visible(kind)

    @property
    def distances(self) -> Tensor:
        """Each key's distance before each position, (1, width, end + width); 0 for its own."""
        before = super().distances
        return torch.cat((before, before.new_zeros(1, self.width, self.width)), 2)

    def visible(self, kind: MaskKind = FULL) -> Tensor:
        """Return which keys each position sees: (1, 1, width, end + width)."""
        here = self.indices[:, None, :, None]
        keys = torch.arange(self.end, device=here.device)
        seen = kind.visible(here, keys) & (keys < here)
        if kind.kept is not None:
            seen = seen & (keys > here - kind.kept)
        own = torch.eye(self.width, dtype=torch.bool, device=here.device)
        return torch.cat((seen, own[None, None]), 3)


class SampleReplies:
    """Replies of the target, on which sets of layers are evaluated.

    At each position of a reply, a draft is made as in a cycle that begins there: with the target's
    own keys and values before it. One pass over all positions gives the exact acceptance of the
    first token of every draft. Of later tokens it is an estimate: in decoding, their context has
    keys of drafted tokens, which skip the same layers.

    Args:
        decoder: The target.
        requests: The samples, which are decoded here; those that fail are ignored.

    Raises:
        InputError: No reply has two tokens.
        Exception: The error of the last request, if none is left.
    """

    @torch.inference_mode()
    def __init__(self, decoder: SplitDecoder, requests: Sequence[Request]) -> None:
        self.decoder = decoder
        self.samples: list[tuple[ContextCache, FirstDraftPositions, Tensor, Tensor]] = []
        failed: Exception | None = None
        for request in Engine(decoder).run(requests):
            if request.error is not None:
                failed = request.error
            else:
                self._add(request)
        if not self.samples:
            if failed is not None:
                raise failed
            raise InputError("No sample has a reply of two tokens or more; give it other prompts.")

    def _add(self, request: Request) -> None:
        """Take a finished request, whose positions are computed once more, all in one pass."""
        decoder, inputs = self.decoder, request.inputs
        start, reply = len(inputs.token_ids), request.output_token_ids
        width = len(reply) - 1
        if not width:
            return
        end = start + width
        tokens = torch.tensor([reply], device=decoder.device)
        cache = decoder.cache(1, end)
        cache.assign(0, inputs)
        x = torch.cat((inputs.embeddings[None], decoder.embed(tokens[:, :-1])), 1)
        decoder.forward_layers(x, cache.positions([0], end), cache, range(decoder.depth))
        places = cache.positions([start], width)
        drafts = FirstDraftPositions(
            places.slots, [start], width, end, places.indices, aligned=True,
            prompts=places.prompts, encoder=places.encoder,
        )  # fmt: skip
        context = ContextCache(cache, end)
        self.samples.append((context, drafts, tokens[:, :-1], tokens[:, 1:]))

    @torch.inference_mode()
    def acceptance(self, skipped: Iterable[int]) -> float:
        """Return the share of positions whose draft is the target's own token."""
        left_out = frozenset(skipped)
        kept = [layer for layer in range(self.decoder.depth) if layer not in left_out]
        right = total = 0
        for cache, positions, tokens, following in self.samples:
            x = self.decoder.forward_layers(self.decoder.embed(tokens), positions, cache, kept)
            right += int((best_columns(self.decoder.head(x)) == following).sum())
            total += following.numel()
        return right / total


@torch.inference_mode()
def measured_costs(decoder: SplitDecoder, context: int) -> StepCosts:
    """Time the parts of decoding, in seconds: medians of `TIMING_ROUNDS` runs.

    Args:
        decoder: The target.
        context: Positions in the cache.
    """
    narrow, wide = 2, 10
    cache = decoder.cache(1, context + wide)
    layers = range(decoder.depth)

    def taken(width: int, layers: range) -> float:
        started = time.perf_counter()
        x = decoder.embed(torch.zeros(1, width, dtype=torch.long, device=decoder.device))
        if layers:
            x = decoder.forward_layers(x, cache.positions([context], width), cache, layers)
        # What is read from a device has been computed.
        best_columns(decoder.head(x)).tolist()
        return time.perf_counter() - started

    parts = ((1, layers), (1, range(0)), (narrow, layers), (wide, layers))
    times: list[list[float]] = [[] for _ in parts]
    for _ in range(TIMING_ROUNDS):
        for found, part in zip(times, parts, strict=True):
            found.append(taken(*part))
    step, head, two, ten = (sorted(found)[TIMING_ROUNDS // 2] for found in times)
    return StepCosts(
        layer=max(step - head, 0.0) / decoder.depth,
        head=head,
        verify=two,
        slope=max(ten - two, 0.0) / (wide - narrow),
    )


def expected_speedup(acceptance: float, kept: int, depth: int, costs: StepCosts) -> float:
    """Return the speedup of the best draft length over ordinary decoding.

    S = E (L l + h) / (g (kept l + h) + verify), with E = 1 + a + ... + a^g.

    Args:
        acceptance: The acceptance rate of drafted tokens (a).
        kept: The number of layers that draft.
        depth: All layers of the target (L).
        costs: The time of each part of decoding: a layer (l), the LM head (h), a verify.
    """
    step, draft = depth * costs.layer + costs.head, kept * costs.layer + costs.head
    best, tokens = 0.0, 1.0
    for length in range(1, MAX_DRAFT_TOKENS + 1):
        tokens += acceptance**length
        verify = costs.verify + costs.slope * (length - 1)
        best = max(best, tokens * step / (length * draft + verify))
    return best


def find_skipped_layers(
    decoder: SplitDecoder,
    requests: Sequence[Request],
    *,
    costs: StepCosts | None = None,
    evaluations: int = MAX_EVALUATIONS,
) -> LayerChoice:
    """Search for the layers to skip that give the most tokens per second.

    Greedy removal: of the layers still kept, the one whose removal costs the least acceptance is
    removed, one after another, except for the first and the last layer; the best set on the way is
    returned.

    Args:
        decoder: The target.
        requests: Sample requests, which are decoded here without drafts. Those that fail are
            ignored.
        costs: The time of each part of decoding; None to measure it.
        evaluations: The maximum number of sets to try; a model of 32 layers has 465. If it is
            reached, the best set so far is returned.

    Raises:
        InputError: No sample has a reply of two tokens or more, or the model has no layer between
            the first and the last, or `evaluations` is below the number of such layers.
    """
    inner = decoder.depth - 2
    if inner < 1:
        raise InputError(
            "A layer can be skipped between the first and the last one; this model has"
            f" {decoder.depth}."
        )
    if evaluations < inner:
        raise InputError(f"The first round alone tries {inner} sets of layers; got {evaluations}.")
    samples = SampleReplies(decoder, requests)
    costs = costs or measured_costs(
        decoder, max(positions.end for _, positions, _, _ in samples.samples)
    )
    candidates = list(range(1, decoder.depth - 1))
    skipped: tuple[int, ...] = ()
    choices: list[LayerChoice] = []
    while candidates and evaluations >= len(candidates):
        evaluations -= len(candidates)
        acceptance, layer = max((samples.acceptance((*skipped, one)), one) for one in candidates)
        candidates.remove(layer)
        skipped = tuple(sorted((*skipped, layer)))
        speedup = expected_speedup(acceptance, decoder.depth - len(skipped), decoder.depth, costs)
        choices.append(LayerChoice(skipped, acceptance, speedup))
    return max(choices, key=lambda choice: choice.speedup)
