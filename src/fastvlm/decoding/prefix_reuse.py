"""What a slot takes over from requests that began as its own, and leaves for others."""

from __future__ import annotations

import torch

from fastvlm.decoding.prefix_cache import PrefixEntry
from fastvlm.decoding.slot import Slot
from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import SplitDecoder


def restore_prefix(slot: Slot, decoder: SplitDecoder, cache: DecoderCache) -> None:
    """Fill a new slot with the kept states of its prompt's prefix.

    Args:
        slot: The slot, whose prompt is assigned to its row of the cache.
        decoder: The target.
        cache: The cache that the slot is a row of.
    """
    request = slot.request
    prefixes, inputs = request.prefix_cache, request.inputs
    if prefixes is None or inputs.keys is None:
        return
    length = len(inputs.token_ids)
    hit = prefixes.match(decoder.position_keys(inputs.keys, length))
    if hit is None:
        return
    # The last position is computed anyway, for its logits.
    known = min(hit.length, length - 1)
    if slot.exits is not None:
        states = hit.entry.exits.get(request.strategy.exit_layer)
        known = 0 if states is None else min(known, len(states))
        if states is not None and known:
            slot.exits.append(states[:known])
    if known:
        cache.import_slot(slot.index, hit.entry.state, known)
        slot.prefilled = slot.length = request.cached = known


def store_prefix(
    slot: Slot, decoder: SplitDecoder, cache: DecoderCache, dtype: torch.dtype
) -> None:
    """Keep the states of a request that has ended, for requests with the same prefix.

    Args:
        slot: The request's slot.
        decoder: The target.
        cache: The cache that the slot is a row of.
        dtype: The precision to keep the exit layer's states in.
    """
    request = slot.request
    prefixes, inputs = request.prefix_cache, request.inputs
    if prefixes is None or inputs.keys is None:
        return
    # The last token's keys and values were never computed.
    tokens = [*inputs.keys, *request.output_token_ids[:-1]]
    keys = list(decoder.position_keys(tokens, len(slot.inputs)))
    length, depth, exits = len(keys), decoder.depth, slot.exits

    def make() -> PrefixEntry:
        state = cache.export_slot(slot.index, length, depth)
        if exits is None:
            return PrefixEntry(keys, state)
        states = exits.since(0)[:length].clone()
        return PrefixEntry(keys, state, {request.strategy.exit_layer: states})

    nbytes = cache.exported_bytes(length, depth)
    if exits is not None:
        nbytes += length * decoder.width * dtype.itemsize
    prefixes.put(keys, nbytes, make)
