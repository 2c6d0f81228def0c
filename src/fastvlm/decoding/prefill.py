"""The prompts' pass, but for what is kept of their beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.prefix_cache import PrefixEntry
from fastvlm.decoding.request import Request
from fastvlm.decoding.strategies import Drafter


@dataclass(slots=True)
class Beginning:
    """What is known of a prompt's beginning.

    Args:
        kept: Where it is kept; None for nothing.
        length: Positions whose keys and values are known.
        seen: Positions that the exit layer need not compute: no more than `length`, and fewer where
            a strategy reads the exit layer's states and fewer of them are kept.
    """

    kept: PrefixEntry | None = None
    length: int = 0
    seen: int = 0


def prefill(batch: Batch, requests: Sequence[Request], drafter: Drafter) -> Tensor:
    """Compute the prompts; return the last layer's state of each one's last position.

    Returns:
        (batch, 1, d_model).
    """
    decoder, cache, exit_layer = batch.decoder, batch.cache, drafter.exit_layer
    observed = observed_layer(drafter)
    known = beginnings(requests, cache.capacity, observed)
    for row, beginning in enumerate(known):
        if beginning.kept is not None:
            state = torch.stack(beginning.kept.state)
            cache.restore(row, state[..., : beginning.length, :])
    lengths = [len(request.tokens) for request in requests]
    seen, starts = [found.seen for found in known], [found.length for found in known]
    x = _side_by_side(
        [request.embeddings[start:] for request, start in zip(requests, seen, strict=True)]
    ).to(decoder.device, decoder.dtype)
    span = cache.span(seen, x.shape[1])
    x = decoder.run(x, span, cache, range(exit_layer))
    if observed is not None:
        exits = [
            x[row, : length - found.seen]
            if found.kept is None or not found.seen
            else torch.cat(
                (found.kept.exits[observed][: found.seen], x[row, : length - found.seen])
            )
            for row, (found, length) in enumerate(zip(known, lengths, strict=True))
        ]
        drafter.observe(_side_by_side(exits))
        for request, states in zip(requests, exits, strict=True):
            request.exits = states if request.store is not None else None
    if seen != starts:
        x = _side_by_side(
            [
                x[row, found.length - found.seen : length - found.seen]
                for row, (found, length) in enumerate(zip(known, lengths, strict=True))
            ]
        )
        span = cache.span(starts, x.shape[1])
    cache.lengths = lengths
    x = decoder.run(x, span, cache, range(exit_layer, decoder.depth))
    last = [length - start - 1 for length, start in zip(lengths, starts, strict=True)]
    return x[torch.arange(len(x), device=x.device), torch.tensor(last, device=x.device)][:, None]


def observed_layer(drafter: Drafter) -> int | None:
    """Return the exit layer whose states of the prompt a strategy reads; None if it reads none.

    Only a network with a cache of its own does.
    """
    return drafter.exit_layer if drafter.cache_layers else None


def beginnings(requests: Sequence[Request], capacity: int, observed: int | None) -> list[Beginning]:
    """Return what is known of each prompt's beginning; its last position is computed anyway.

    Args:
        requests: The rows.
        capacity: Positions of the cache.
        observed: The exit layer whose states of the prompts are needed, too; None for none.
    """
    known = []
    for request in requests:
        found = None if request.store is None else request.store.match(request.keys)
        if found is None:
            known.append(Beginning())
            continue
        kept, shared = found.entry, found.length
        length = min(shared, len(request.tokens) - 1)
        seen = length
        if observed is not None:
            seen = min(length, len(kept.exits[observed])) if observed in kept.exits else 0
        known.append(Beginning(kept, length, seen))
    rest = max(len(r.tokens) - found.seen for r, found in zip(requests, known, strict=True))
    if max(found.length for found in known) + rest > capacity:
        # A long prompt beside one whose beginning is kept: all are computed from the start.
        return [Beginning() for _ in requests]
    return known


def remember(batch: Batch, row: int, request: Request, drafter: Drafter) -> None:
    """Keep what was computed of a request that has ended, for those that begin as it does."""
    if request.store is None:
        return
    # The last token's keys and values were never computed.
    keys = [*request.keys, *request.reply[:-1]]
    observed = observed_layer(drafter)
    exits = {} if observed is None or request.exits is None else {observed: request.exits.clone()}
    state = batch.cache.read(row, len(keys), batch.decoder.depth)
    entry = PrefixEntry(keys, list(state), exits)
    request.store.put(keys, entry.nbytes, lambda: entry)
    request.exits = None


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """Return rows of different lengths, (length, width) each, as (batch, longest, width)."""
    return rows[0][None] if len(rows) == 1 else pad_sequence(list(rows), batch_first=True)
