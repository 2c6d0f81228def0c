"""Admission: which requests wait, and which of them enter, as slots and memory allow."""

from __future__ import annotations

import warnings
from bisect import insort
from collections.abc import Callable, Sequence

from fastvlm.decoding.request import Request
from fastvlm.decoding.slot import Slot
from fastvlm.functional.errors import InputError
from fastvlm.functional.memory import available_memory
from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import SplitDecoder

PRIORITY_SECONDS = 10.0
"""Seconds of waiting that count as one level of priority, so that nobody waits for ever."""
CACHE_SHARE = 0.5
"""The default share of a device's available memory that the cache may take."""
ASSUMED_HEADS_WIDTH = 2
"""The width of all heads' keys, in d_model, that is assumed until it is measured."""


class Admission:
    """The queue of requests that wait for a slot, and the rule by which they leave it.

    They enter in the order of their arrival, where a level of priority counts as
    `PRIORITY_SECONDS`. The cache is rectangular, so one with a long prompt makes all rows longer:
    while the next request doesn't fit, nobody overtakes it, and once the slots are empty it has all
    of the memory. The bytes of a position are measured when the first request computes.

    Args:
        decoder: The target.
        max_slots: The maximum number of requests decoded together.
        max_cache_bytes: The maximum bytes of the cache; None for `CACHE_SHARE` of what the device
            has left now.
        verify_width: Positions that every verify computes, see `Batch`.
        clock: Returns the time in seconds, from any starting point.

    Raises:
        InputError: There is not one slot, or not one byte.
    """

    def __init__(
        self,
        decoder: SplitDecoder,
        max_slots: int,
        max_cache_bytes: int | None,
        verify_width: int | None,
        clock: Callable[[], float],
    ) -> None:
        if max_slots < 1 or (max_cache_bytes is not None and max_cache_bytes < 1):
            raise InputError(
                "An engine has at least one slot and one byte for its cache; got max_slots="
                f"{max_slots} and max_cache_bytes={max_cache_bytes}."
            )
        if max_cache_bytes is None:
            left = available_memory(decoder.device)
            max_cache_bytes = None if left is None else int(CACHE_SHARE * left)
        self.decoder, self.max_slots, self.max_cache_bytes = decoder, max_slots, max_cache_bytes
        self.verify_width, self.clock = verify_width, clock
        self.waiting: list[Request] = []
        """In the order in which they enter."""
        self.layer_bytes: float | None = None
        """Bytes of a position in a layer of the target, on average; None until it is measured."""

    def add(self, request: Request) -> InputError | None:
        """Put a request into the queue, or return what is wrong with it."""
        error = self._fitted(request) or self.too_large(request)
        if error is None:
            request.turn = self.clock() + PRIORITY_SECONDS * request.priority
            insort(self.waiting, request, key=lambda one: one.turn)
        return error

    def drop_finished(self) -> None:
        """Take requests out of the queue that were cancelled."""
        self.waiting = [request for request in self.waiting if not request.finished]

    def next(self, slots: Sequence[Slot], cache: DecoderCache) -> list[Request]:
        """Take the requests out of the queue that enter now, and fail those that never could.

        Args:
            slots: The slots that are occupied.
            cache: The cache.
        """
        self.drop_finished()
        admitted: list[Request] = []
        while self.waiting and len(slots) + len(admitted) < self.max_slots:
            request = self.waiting[0]
            error = self.too_large(request)
            if error is not None:
                request.fail(error)
            elif self._fits([*admitted, request], slots, cache):
                admitted.append(request)
            else:
                break
            del self.waiting[0]
        return admitted

    def reserve(
        self, admitted: Sequence[Request], slots: Sequence[Slot], cache: DecoderCache
    ) -> None:
        """Reserve the cache's memory for requests beside those that decode."""
        rows, capacity = self._room(admitted, slots, cache)
        if cache.layers and rows > cache.slots:
            # Room for more at once: making room copies those that decode.
            more = min(max(rows, 2 * cache.slots), self.max_slots)
            if self._within(self._bytes(_together(admitted, slots), more * capacity)):
                rows = more
        cache.reserve(rows, capacity)

    def suits(self, admitted: Sequence[Request], cache: DecoderCache) -> bool:
        """Return whether a cache that nobody decodes in has room for these."""
        rows, capacity = self._room(admitted, (), DecoderCache(cache.device))
        return rows <= cache.slots and capacity <= cache.capacity

    def free_slots(self, slots: Sequence[Slot]) -> list[int]:
        """Return the numbers of the slots that nobody occupies."""
        taken = {slot.index for slot in slots}
        return [index for index in range(self.max_slots) if index not in taken]

    def measure(self, cache: DecoderCache) -> None:
        """Measure what a position takes in a cache that a request has filled."""
        self.layer_bytes = cache.exported_bytes(1, self.decoder.depth) / self.decoder.depth

    def forget(self) -> None:
        """Forget what was measured, as the model is elsewhere now or in another precision."""
        self.layer_bytes = None

    def too_large(self, request: Request) -> InputError | None:
        """Return what is wrong with a request that doesn't fit into an empty cache."""
        if self.layer_bytes is None or self.max_cache_bytes is None:
            return None
        needed = self._bytes([request], DecoderCache.rounded(self._capacity(request)))
        if self._within(needed):
            return None
        return InputError(
            f"The prompt of {len(request.inputs.token_ids)} tokens and a reply of up to"
            f" {request.max_new_tokens} need {needed:,} bytes of the cache, which may take"
            f" {self.max_cache_bytes:,}."
        )

    def _room(
        self, admitted: Sequence[Request], slots: Sequence[Slot], cache: DecoderCache
    ) -> tuple[int, int]:
        """Return the slots and positions that the cache has with these requests."""
        needed = self.free_slots(slots)[len(admitted) - 1] + 1
        capacity = DecoderCache.rounded(max(map(self._capacity, admitted)))
        return max(needed, cache.slots), max(capacity, cache.capacity)

    def _fits(
        self, requests: Sequence[Request], slots: Sequence[Slot], cache: DecoderCache
    ) -> bool:
        """Return whether the cache with these requests is within its bound."""
        if len(requests) == 1 and not slots:
            # It is alone, and not too large as far as that is known.
            return True
        rows, capacity = self._room(requests, slots, cache)
        return self._within(self._bytes(_together(requests, slots), rows * capacity))

    def _within(self, needed: int) -> bool:
        return self.max_cache_bytes is None or needed <= self.max_cache_bytes

    def _bytes(self, requests: Sequence[Request], positions: int) -> int:
        """Return the bytes of a cache of so many positions, in all its slots together.

        An imitation network's layers are of the target's own kind.
        """
        layers = self.decoder.depth + max(one.strategy.cache_layers for one in requests)
        each = self.layer_bytes
        if each is None:
            each = 2 * ASSUMED_HEADS_WIDTH * self.decoder.width * self.decoder.dtype.itemsize
        return int(positions * layers * each)

    def _capacity(self, request: Request) -> int:
        """Return the positions that a request may write to."""
        # The last token is never written, but a draft's tokens are before they are rejected.
        spare = request.strategy.max_draft_tokens
        if self.verify_width is not None:
            spare = self.verify_width - 1
        return len(request.inputs.token_ids) + request.max_new_tokens + spare

    def _fitted(self, request: Request) -> InputError | None:
        """Fit a request's limit to the positions that there are; return what is wrong with it."""
        length, decoder = len(request.inputs.token_ids), self.decoder
        if request.max_new_tokens < 1:
            return InputError(f"max_new_tokens must be at least 1; got {request.max_new_tokens}.")
        drafted = request.strategy.max_draft_tokens
        if self.verify_width is not None and self.verify_width <= drafted:
            return InputError(
                f"Drafts of up to {drafted} tokens are verified {drafted + 1} wide, but the width"
                f" is {self.verify_width}."
            )
        if length >= decoder.context:
            return InputError(
                f"The prompt has {length} tokens with its images, but the model's context is"
                f" {decoder.context}."
            )
        left = decoder.room(length)
        if left is not None and request.max_new_tokens > left:
            warnings.warn(
                f"The reply ends after {left} tokens, {decoder.ending}; {request.max_new_tokens}"
                " were asked for.",
                stacklevel=4,
            )
            request.max_new_tokens = left
        return None


def _together(requests: Sequence[Request], slots: Sequence[Slot]) -> list[Request]:
    """Return requests with those that decode."""
    return [*requests, *(slot.request for slot in slots)]
