"""Prompt lookup: tokens that followed an earlier occurrence of the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.history import Copy, History
from fastvlm.decoding.slot import Slot


@dataclass(frozen=True, slots=True)
class Lookup:
    """Looks up what may follow, for the rows of a batch. Each slot keeps the history of its own.

    Args:
        ngram: The maximum number of last tokens to look for.
    """

    ngram: int = 3

    def copies(
        self, batch: Batch, drafts: Sequence[Sequence[int]], most: Sequence[int]
    ) -> list[Copy | None]:
        """Return what may follow each row's draft; None where nothing is found.

        Args:
            batch: The slots.
            drafts: Each row's tokens that are drafted already.
            most: The maximum number of tokens to copy in each row.
        """
        size = batch.decoder.vocabulary_size
        found: list[Copy | None] = []
        for slot, drafted, limit in zip(batch.slots, drafts, most, strict=True):
            copy = self.history(slot).look_up(drafted, limit) if limit > 0 else None
            if copy is not None:
                reply = [*slot.request.output_token_ids, *drafted]
                tokens = slot.request.sampler.permitted(reply, copy.tokens, size)
                copy = Copy(up_to_end(tokens, slot.request.end_token_ids), copy.match)
            found.append(copy if copy and copy.tokens else None)
        return found

    def history(self, slot: Slot) -> History:
        """Return a slot's history, up to its last token."""
        request = slot.request
        if slot.history is None:
            slot.history = History(self.ngram)
            slot.history.extend(request.prompt_token_ids)
        known = len(slot.history.tokens) - len(request.prompt_token_ids)
        slot.history.extend(request.output_token_ids[known:])
        return slot.history


def up_to_end(tokens: list[int], ends: frozenset[int] | set[int]) -> list[int]:
    """Return tokens up to the first that ends a reply."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
