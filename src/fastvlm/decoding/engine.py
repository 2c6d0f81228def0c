"""The engine: requests enter and leave its slots between steps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby, islice
from threading import Condition, Lock

import torch

from fastvlm.decoding.admission import Admission
from fastvlm.decoding.attempt import attempt
from fastvlm.decoding.batch import Batch
from fastvlm.decoding.cycle import cycle, prefill
from fastvlm.decoding.prefix_reuse import restore_prefix, store_prefix
from fastvlm.decoding.request import Request
from fastvlm.decoding.restarts import restart_of, restart_slots
from fastvlm.decoding.slot import ExitStates, Slot
from fastvlm.functional.errors import InputError, first_line
from fastvlm.functional.threads import one_thread
from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import SplitDecoder

MAX_SLOTS = 16
"""The default maximum number of requests decoded together."""
PREFILL_POSITIONS = 1024
"""The default maximum of prompt positions that a step computes while replies are decoded."""


class Engine:
    """Decodes requests together, each with its own strategy, sampler and limit.

    It may be called from any thread. It has no thread of its own: whoever needs tokens next makes
    the step for all. An error of one request is its own result, `Request.error`, and the others go
    on.

    Args:
        decoder: The target.
        max_slots: The maximum number of requests decoded together; others wait.
        max_cache_bytes: The maximum bytes of the cache: requests enter while it has room for them.
            None for half of the memory that the device has left.
        prefill_positions: The maximum of prompt positions that a step computes while replies are
            decoded: a longer prompt is computed in chunks, a step each.
        verify_width: Positions that every verify computes, see `Batch`; None for as many as needed.
        clock: Returns the time in seconds, from any starting point, by which drafts adapt.

    Raises:
        InputError: `max_slots`, `max_cache_bytes` or `prefill_positions` is below 1.
    """

    def __init__(
        self,
        decoder: SplitDecoder,
        *,
        max_slots: int = MAX_SLOTS,
        max_cache_bytes: int | None = None,
        prefill_positions: int = PREFILL_POSITIONS,
        verify_width: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if prefill_positions < 1:
            raise InputError(
                "An engine computes at least one position of a prompt in a step; got"
                f" prefill_positions={prefill_positions}."
            )
        self.decoder = decoder
        self.max_slots, self.prefill_positions = max_slots, prefill_positions
        self.verify_width, self.clock = verify_width, clock
        self.cache = DecoderCache(torch.device("cpu"))
        self.slots: list[Slot] = []
        """The requests that decode, in the order in which they came."""
        self.admission = Admission(decoder, max_slots, max_cache_bytes, verify_width, clock)
        self._dtype = torch.float32
        self._idle_bytes = 0
        """The most bytes of the cache that stay while nothing is decoded."""
        # A plain lock: a stream that is forgotten cancels its request wherever the interpreter
        # happens to be, also inside a block that holds it, and must neither wait nor enter.
        self._turn = Condition(Lock())
        self._stepping = False
        self._cancelled = False
        """Whether a request was cancelled whose slot may not be free yet."""

    @property
    def waiting(self) -> list[Request]:
        """The requests that wait for a slot, in the order in which they enter."""
        return self.admission.waiting

    def add(self, request: Request) -> None:
        """Put a request into the queue. If it is invalid, it ends at once with an error.

        Raises:
            InputError: The request was added before.
        """
        if request.finished:
            return
        if request.added:
            raise InputError("A request decodes once; make another of the same inputs.")
        device = self.decoder.device.type
        request.added = True
        request.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        request.kind = id(request.strategy), str(request.autocast)
        with self._turn:
            error = self.admission.add(request)
        if error is not None:
            request.fail(error)
        self._settle()

    def cancel(self, request: Request) -> None:
        """End a request, whose slot is free before the next step. One that has ended is left alone.

        It never blocks, so that a finalizer may call it.
        """
        if not request.finished:
            request.finish_reason = "cancelled"
            self._cancelled = True
            self._settle()

    def step(self, unless: Callable[[], bool] | None = None) -> dict[Request, int]:
        """Admit waiting requests, compute prompts, and run one cycle of all slots.

        If another thread is making a step, wait for it.

        Args:
            unless: A condition under which no step is needed, checked when it could begin.

        Returns:
            The number of tokens that each request in a slot gained; empty if no step was needed.
        """
        if not self._take_turn(unless):
            return {}
        try:
            with torch.inference_mode():
                if self._cancelled:
                    self._cancelled = False
                    self._free_finished()
                if self.waiting:
                    self._admit()
                self._close_gaps()
                restart_slots(self.slots, self.decoder, self.cache)
                before = {slot.request: len(slot.request.output_token_ids) for slot in self.slots}
                for slots, work in self._passes():
                    self._make(slots, work)
                self._measure()
                self._free_finished()
            return {
                request: len(request.output_token_ids) - known for request, known in before.items()
            }
        finally:
            self._give_turn()

    def run(self, requests: Iterable[Request]) -> Generator[Request]:
        """Decode requests, and yield each when it has finished.

        Args:
            requests: The requests, read as slots become free. Unfinished ones are cancelled when
                the iterator is closed.
        """
        source, decoding = iter(requests), list[Request]()
        try:
            while True:
                for request in islice(source, self.max_slots - len(decoding)):
                    decoding.append(request)
                    self.add(request)
                if not decoding:
                    return
                while not (finished := [request for request in decoding if request.finished]):
                    self.step(unless=lambda: any(request.finished for request in decoding))
                for request in finished:
                    decoding.remove(request)
                    yield request
        finally:
            for request in decoding:
                self.cancel(request)

    def run_all(self, requests: Iterable[Request]) -> list[Request]:
        """Decode requests, and return them in order. See `run`."""
        made: list[Request] = []

        def noted() -> Iterator[Request]:
            for request in requests:
                made.append(request)
                yield request

        for _ in self.run(noted()):
            pass
        return made

    def _take_turn(self, unless: Callable[[], bool] | None) -> bool:
        """Take the turn to step; return False where it turned out that no step is needed."""
        with self._turn:
            while True:
                if unless is not None and unless():
                    return False
                if not self._stepping:
                    self._stepping = True
                    return True
                self._turn.wait()

    def _give_turn(self) -> None:
        """Let others step, and free what was cancelled meanwhile."""
        with self._turn:
            self._stepping = False
            self._turn.notify_all()
        self._settle()

    def _settle(self) -> None:
        """Free the slots of cancelled requests, unless a step is under way, which will."""
        while self._cancelled and self._turn.acquire(blocking=False):
            try:
                if self._stepping:
                    return
                self._cancelled = False
                self._free_finished()
                self.admission.drop_finished()
                self._turn.notify_all()
            finally:
                self._turn.release()

    def _passes(self) -> list[tuple[list[Slot], Callable[[Batch], None]]]:
        """Return what this step does: the slots of each pass, by their numbers, and the pass."""
        found: list[tuple[list[Slot], Callable[[Batch], None]]] = []
        for slots, width in self._chunks():
            exit_layer = slots[0].request.strategy.exit_layer if slots[0].exits else 0
            found.append((slots, partial(prefill, width=width, exit_layer=exit_layer)))
        decoding = [slot for slot in self.slots if slot.decodes]
        decoding.sort(key=lambda slot: (slot.request.kind, slot.index))
        for _, group in groupby(decoding, key=lambda slot: slot.request.kind):
            slots = list(group)
            found.append((slots, partial(cycle, strategy=slots[0].request.strategy)))
        return found

    def _batch(self, slots: Sequence[Slot]) -> Batch:
        return Batch(self.decoder, self.cache, slots, self.clock, self.verify_width)

    def _autocast(self, slots: Sequence[Slot]) -> AbstractContextManager[object]:
        """Compute as the thread would that added these slots' requests, whichever steps."""
        device, (enabled, dtype) = self.cache.device.type, slots[0].request.autocast
        if not enabled and not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, dtype, enabled=enabled)

    def _make(self, slots: Sequence[Slot], work: Callable[[Batch], None]) -> None:
        """Make a pass; one that fails is made again, slot by slot, and fails those that can't.

        Nothing of a pass that fails has been committed.
        """
        # A runtime other than torch has threads of its own.
        threads = nullcontext if self.decoder.runtime == "torch" else one_thread

        def computed() -> None:
            with self._autocast(slots), threads():
                work(self._batch(slots))

        error = attempt(computed)
        if error is None:
            return
        if len(slots) == 1:
            slots[0].request.fail(error)
            return
        for slot in slots:
            self._make([slot], work)

    def _free_finished(self) -> None:
        """Free the slots of requests that have ended, and keep what was computed for them."""
        for slot in [slot for slot in self.slots if slot.request.finished]:
            request = slot.request
            if request.finish_reason in ("stop", "length"):
                # The reply is whole, whatever becomes of this.
                error = attempt(partial(self._keep, slot))
                if error is not None:
                    warnings.warn(
                        f"A reply has ended, but nothing of it is kept: {first_line(error)}.",
                        stacklevel=2,
                    )
            self._free(slot)

    def _chunks(self) -> Iterator[tuple[list[Slot], int]]:
        """Yield the slots whose prompts are computed next, and how many positions of them.

        Those of the same width go through the layers together, so nothing is ever padded. A prompt
        is cut only where somebody would wait for it.
        """
        left = self.prefill_positions if any(slot.decodes for slot in self.slots) else None
        groups: dict[tuple[int, int, object], list[Slot]] = {}
        for slot in self.slots:
            if slot.decodes:
                continue
            inputs = slot.inputs
            width = len(inputs) - slot.prefilled
            if left is not None:
                width = inputs.chunk_end(slot.prefilled, left) - slot.prefilled if left else 0
                left = max(left - width, 0)
            if width:
                exit_layer = slot.request.strategy.exit_layer if slot.exits else 0
                key = width, exit_layer, slot.request.autocast
                groups.setdefault(key, []).append(slot)
        for (width, _, _), slots in groups.items():
            yield sorted(slots, key=lambda slot: slot.index), width

    def _admit(self) -> None:
        """Give free slots to waiting requests, while the cache has room for them."""
        with self._turn:
            admitted = self.admission.next(self.slots, self.cache)
        if not admitted:
            return
        error = attempt(partial(self._make_room, admitted))
        if error is not None:
            for request in admitted:
                request.fail(error)
            return
        for index, request in zip(self.admission.free_slots(self.slots), admitted, strict=False):
            error = attempt(partial(self._seat, index, request))
            if error is not None:
                self.cache.release(index)
                request.fail(error)

    def _make_room(self, admitted: Sequence[Request]) -> None:
        """Reserve the cache's memory for requests beside those that decode."""
        self._follow_model()
        if not self.slots and not self.admission.suits(admitted, self.cache):
            self.cache = DecoderCache(self.cache.device)
        self.admission.reserve(admitted, self.slots, self.cache)

    def _close_gaps(self) -> None:
        """Move slots to free numbers below theirs.

        Rows side by side are read where they lie; others are copied in each step.
        """
        number = len(self.slots)
        beyond = [slot for slot in self.slots if slot.index >= number]
        taken = {slot.index for slot in self.slots}
        for slot, index in zip(beyond, sorted(set(range(number)) - taken), strict=True):
            self.cache.move(slot.index, index)
            slot.index = index

    def _measure(self) -> None:
        """Measure what a position takes, and refuse what was admitted before that was known."""
        if self.admission.layer_bytes is None and any(slot.length for slot in self.slots):
            self.admission.measure(self.cache)
            for slot in self.slots:
                error = self.admission.too_large(slot.request)
                if error is not None and not slot.request.finished:
                    slot.request.fail(error)

    def _seat(self, index: int, request: Request) -> None:
        """Give a request a slot, with what is known of its prompt's beginning."""
        inputs = request.inputs
        self.cache.assign(index, inputs)
        exits = None
        if request.strategy.cache_layers:
            exits = ExitStates(kept=request.prefix_cache is not None and inputs.keys is not None)
        slot = Slot(index, request, exits)
        slot.restart = restart_of(self.decoder, inputs)
        restore_prefix(slot, self.decoder, self.cache)
        self.slots.append(slot)

    def _keep(self, slot: Slot) -> None:
        """Tell its strategy of a request that has ended, and keep what others begin with."""
        slot.request.strategy.on_finish(len(slot.request.output_token_ids))
        store_prefix(slot, self.decoder, self.cache, self._dtype)

    def _follow_model(self) -> None:
        """Take over where and in what precision the model computes now."""
        # One whole cache is read in passes that are to round alike: its size must not vary.
        self._idle_bytes = self.decoder.follow() if self.verify_width is None else 0
        device, dtype = self.decoder.device_and_dtype()
        moved = (device, dtype) != (self.cache.device, self._dtype)
        if self.slots and moved:
            for slot in list(self.slots):
                slot.request.fail(InputError("The model was moved or cast while this was decoded."))
                self._free(slot)
        if not self.slots:
            if moved:
                self.admission.forget()
            if moved or not self._idle_bytes:
                self.cache = DecoderCache(device)
            self._dtype = dtype

    def _free(self, slot: Slot) -> None:
        """Free a slot; the last one gives the cache's memory back, but for a little of it."""
        self.slots.remove(slot)
        self.cache.release(slot.index)
        if not self.slots:
            if self.cache.nbytes <= self._idle_bytes:
                self.cache.tables.clear()
            else:
                self.cache = DecoderCache(self.cache.device)
