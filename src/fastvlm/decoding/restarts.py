"""Rows of which all positions are computed anew, where `generate` does it. See `SplitDecoder`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch.nn import functional as F

from fastvlm.decoding.slot import ExitStates, Slot
from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.decoder_inputs import OUTSIDE, DecoderInputs


def restart_of(decoder: SplitDecoder, inputs: DecoderInputs) -> int | None:
    """Return the length at which all of a prompt's row is computed anew; None for never."""
    length = decoder.restart
    return None if length is None or len(inputs) > length else length


def restart_slots(slots: Iterable[Slot], decoder: SplitDecoder, cache: DecoderCache) -> None:
    """Turn prompt and reply into a new prompt, where a row has come to its restart."""
    for slot in slots:
        if slot.restart is None or slot.length < slot.restart or slot.request.finished:
            continue
        slot.restarted = extended(decoder, slot.request.inputs, slot.request.output_token_ids)
        slot.restart = None
        slot.prefilled = slot.length = slot.drafted_length = 0
        if slot.exits is not None:
            slot.exits = ExitStates(kept=slot.exits.kept)
        cache.assign(slot.index, slot.restarted)


def extended(decoder: SplitDecoder, inputs: DecoderInputs, reply: list[int]) -> DecoderInputs:
    """Return a prompt with a reply's tokens behind it."""
    device = inputs.embeddings.device
    more = decoder.embed(torch.tensor(reply, device=decoder.device))
    ids, blocks = inputs.position_ids, inputs.blocks
    if ids is not None:
        counted = ids.max() + 1 + torch.arange(len(reply), device=ids.device)
        ids = torch.cat((ids, counted.expand(len(ids), -1)), 1)
    return replace(
        inputs,
        token_ids=[*inputs.token_ids, *reply],
        embeddings=torch.cat((inputs.embeddings, more.to(device))),
        position_ids=ids,
        blocks=None if blocks is None else F.pad(blocks, (0, len(reply)), value=OUTSIDE),
        keys=None,
    )
