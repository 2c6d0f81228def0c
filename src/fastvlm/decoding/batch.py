"""The slots that go through a cycle together, as strategies see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlm.decoding.sampler import Sampler
from fastvlm.decoding.slot import Slot
from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.positions import Positions


@dataclass(frozen=True, slots=True)
class Batch:
    """Slots that decode with one strategy.

    Args:
        decoder: The target.
        cache: The target's cache.
        slots: The slots, a row each.
        clock: Returns the time in seconds, from any starting point.
        verify_width: Positions that every verify computes; None for as many as it needs. The
            rounding of a matrix product depends on the number of rows, and in bfloat16 that can
            change tokens. With one width and one exit layer for all, drafting changes nothing to
            the last bit of a single request.
    """

    decoder: SplitDecoder
    cache: DecoderCache
    slots: Sequence[Slot]
    clock: Callable[[], float]
    verify_width: int | None = None

    @property
    def last(self) -> list[int]:
        """Each row's last committed token, which the cache doesn't hold yet."""
        return [slot.last for slot in self.slots]

    @property
    def replies(self) -> list[list[int]]:
        """Each row's reply so far."""
        return [slot.request.output_token_ids for slot in self.slots]

    @property
    def samplers(self) -> list[Sampler]:
        """How each row chooses its tokens."""
        return [slot.request.sampler for slot in self.slots]

    @property
    def lengths(self) -> list[int]:
        """Each row's committed positions."""
        return [slot.length for slot in self.slots]

    def positions(
        self, starts: Sequence[int], width: int, *, to_the_end: bool = False
    ) -> Positions:
        """Return the positions of a pass over these rows. See `DecoderCache.positions`.

        Args:
            starts: The first position of each row.
            width: Positions of each row.
            to_the_end: Whether the pass reads the whole cache, so that rounding is always the same.
        """
        rows = [slot.index for slot in self.slots]
        return self.cache.positions(starts, width, rows, to_the_end=to_the_end)

    def embed(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the embeddings of rows of tokens: (batch, new, d_embedding)."""
        return self.decoder.embed(torch.tensor(token_ids, device=self.cache.device))
