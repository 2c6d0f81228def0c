"""The passes of the engine: prefill, and the cycle of draft, verify, accept, commit, deliver."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.draft_loop import Draft, add_forced
from fastvlm.decoding.sampler import target_tokens
from fastvlm.decoding.strategies import Strategy
from fastvlm.functional.acceptance import accept


def cycle(batch: Batch, strategy: Strategy) -> None:
    """Draft, verify, accept, commit and deliver once, for slots of one strategy.

    Until the commit nothing of a slot changes that matters: a cycle that failed can be made again.
    """
    rooms, prepared = [slot.room for slot in batch.slots], batch.decoder.prepared
    draft = strategy.draft(batch, rooms)
    add_forced(batch, draft, [min(room, strategy.max_draft_tokens) for room in rooms])
    logits, hidden = verify(batch, strategy.exit_layer, draft)
    chosen = target_tokens(batch.samplers, batch.replies, draft.rows, logits)
    found = [accept(row, own) for row, own in zip(draft.rows, chosen, strict=True)]
    accepted = [count for count, _ in found]
    if batch.decoder.prepared == prepared:
        # What preparing took says nothing of cycles to come.
        strategy.on_verified(draft, accepted, batch.clock())
    commit(batch, draft, accepted, hidden)
    for slot, row, count in zip(batch.slots, draft.rows, accepted, strict=True):
        slot.request.proposed.append(len(row))
        slot.request.accepted.append(count)
    tokens = [[*row[:count], last] for row, (count, last) in zip(draft.rows, found, strict=True)]
    deliver(batch, tokens, logits)


def verify(batch: Batch, exit_layer: int, draft: Draft) -> tuple[Tensor, Tensor | None]:
    """Run the full model over the last committed tokens and the drafts.

    Hidden states that drafting computed are reused: the first layers run on what it has not
    computed (the last drafted token, and copied ones), and the other layers on all hidden states;
    where one pass is faster (see `SplitDecoder.recomputes`), or drafting has kept no states, all
    layers run on all positions.

    Args:
        batch: The slots.
        exit_layer: Layers that drafting has run (k); 0 for none.
        draft: The draft, g tokens in its longest row.

    Returns:
        The target's logits, (batch, g + 1, vocabulary), and the exit layer's hidden states,
        (batch, g + 1, d_model), or None where no slot keeps any.
    """
    decoder, cache, starts = batch.decoder, batch.cache, batch.lengths
    if batch.verify_width is None and (decoder.recomputes or draft.hidden is None):
        return _verify_all(batch, exit_layer, draft)
    width = 1 + draft.width
    known = draft.computed
    x = batch.embed([row[known:] for row in _rows(batch, draft)])
    if exit_layer:
        # A draft step computes one position; so does what is to be rounded as one.
        step = width - known if batch.verify_width is None else 1
        parts = []
        for begin in range(known, width, step):
            places = batch.positions([start + begin for start in starts], step)
            part = x[:, begin - known : begin - known + step]
            parts.append(decoder.forward_layers(part, places, cache, range(exit_layer)))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if draft.hidden is not None:
            x = torch.cat((draft.hidden, x), 1)
    hidden = x if exit_layer else None
    if batch.verify_width is not None:
        x = F.pad(x, (0, 0, 0, batch.verify_width - width))
    places = batch.positions(starts, x.shape[1], to_the_end=batch.verify_width is not None)
    x = decoder.forward_layers(x, places, cache, range(exit_layer, decoder.depth))
    return decoder.head(x)[:, :width], hidden


def _verify_all(batch: Batch, exit_layer: int, draft: Draft) -> tuple[Tensor, Tensor | None]:
    """Run the full model over all positions, whatever drafting has computed. See `verify`."""
    decoder, cache = batch.decoder, batch.cache
    rows = _rows(batch, draft)
    positions = batch.positions(batch.lengths, len(rows[0]))
    kept = any(slot.exits is not None for slot in batch.slots)
    exits, logits = decoder.forward_tokens(rows, positions, cache, exit_layer if kept else 0)
    return logits, exits


def _rows(batch: Batch, draft: Draft) -> list[list[int]]:
    """Return each row's last committed token and draft, in rows of one length."""
    rows = zip(batch.last, draft.rows, strict=True)
    return [[last, *drafted] + [last] * (draft.width - len(drafted)) for last, drafted in rows]


def commit(batch: Batch, draft: Draft, accepted: Sequence[int], hidden: Tensor | None) -> None:
    """Set each slot's lengths.

    Args:
        batch: The slots.
        draft: The draft, g tokens in its longest row.
        accepted: The number of drafted tokens that each slot accepted.
        hidden: The exit layer's hidden states, (batch, g + 1, d_model); None for a strategy without
            an exit layer.
    """
    for row, (slot, count) in enumerate(zip(batch.slots, accepted, strict=True)):
        if slot.exits is not None and hidden is not None:
            slot.exits.append(hidden[row, : count + 1])
            if draft.computed:
                # The network has seen the last committed token and all drafted ones but the last.
                slot.drafted_length = slot.length + min(count + 1, draft.computed)
            slot.exits.forget(slot.drafted_length)
        slot.length += count + 1


def deliver(batch: Batch, tokens: Sequence[Sequence[int]], logits: Tensor) -> None:
    """Give each request its tokens; an error of its own stopping criteria fails that request only.

    Args:
        batch: The slots.
        tokens: Each slot's new tokens.
        logits: The target's, (batch, tokens or more, vocabulary).
    """
    now = batch.clock()
    for row, slot in enumerate(batch.slots):
        try:
            slot.request.deliver(tokens[row], logits[row], now)
        except Exception as error:  # noqa: BLE001 (a user's code, which may raise anything)
            slot.request.fail(error)


def prefill(batch: Batch, width: int, exit_layer: int) -> None:
    """Compute the next positions of prompts; a prompt that is complete gives its first token.

    Args:
        batch: The slots.
        width: The number of positions to compute for each slot.
        exit_layer: The layer whose hidden states are kept for drafting; 0 for none.
    """
    decoder, cache, slots = batch.decoder, batch.cache, batch.slots
    starts = [slot.prefilled for slot in slots]
    device, dtype = decoder.device_and_dtype()
    x = torch.stack(
        [
            slot.inputs.embeddings[start : start + width]
            for slot, start in zip(slots, starts, strict=True)
        ]
    ).to(device, dtype)
    positions = batch.positions(starts, width)
    exits, x = decoder.forward_all(x, positions, cache, exit_layer)
    through = [
        row
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True))
        if start + width == len(slot.inputs)
    ]
    done = Batch(decoder, cache, [slots[row] for row in through], batch.clock)
    tokens, logits = [], x
    if through:
        logits = decoder.head(x[through, -1:])
        chosen = target_tokens(done.samplers, done.replies, [[] for _ in through], logits)
        tokens = [row[:1] for row in chosen]
    for row, slot in enumerate(slots):
        if slot.exits is not None and exits is not None:
            slot.exits.append(exits[row])
        slot.prefilled += width
        slot.length = slot.prefilled
    deliver(done, tokens, logits)
