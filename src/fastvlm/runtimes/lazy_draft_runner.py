"""Draft steps in ONNX Runtime for a decoder in torch, made ready when first drafted with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

from fastvlm.functional.errors import InputError
from fastvlm.language.cache import KeyValueCache
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.draft_path import DraftPath, DraftsAhead, Draws
from fastvlm.language.positions import Positions
from fastvlm.runtimes.draft_size import is_small


class LazyDraftRunner:
    """See `DraftsAhead`: several steps at once where that can be, none where it can't.

    Args:
        split: The decoder.
        make: Makes what drafts for it; it raises `InputError` where the decoder is of a form, or on
            a device or in a precision, that it doesn't know, and `ImportError` where a library is
            broken.
    """

    def __init__(self, split: SplitDecoder, make: Callable[[SplitDecoder], DraftsAhead]) -> None:
        self.split, self.make = split, make
        self._turn = Lock()
        self._runner: DraftsAhead | None = None
        self._place: tuple[torch.device, torch.dtype] | None = None
        """Where and in what precision the decoder was when a runner was last to be made."""

    @property
    def prepared(self) -> int:
        """How often a call has prepared others like it. See `SplitDecoder.prepared`."""
        return 0 if self._runner is None else self._runner.prepared

    def follow(self) -> None:
        """Take over what has changed about the model. See `SplitDecoder.follow`."""
        if self._runner is not None:
            self._runner.follow()

    def least(self, path: DraftPath, drafted: int) -> int:
        """Return how many steps are worth a call. See `DraftsAhead.least`."""
        runner = self._made(path)
        if runner is not None:
            try:
                return runner.least(path, drafted)
            except InputError:
                # The model has parts of another form by now.
                self._runner = None
        return 1

    def draft_ahead(
        self,
        tokens: Sequence[int],
        positions: Positions,
        cache: KeyValueCache,
        path: DraftPath,
        behind: Tensor | None = None,
        draws: Draws | None = None,
    ) -> list[tuple[list[int], list[float]]] | None:
        """Run several draft steps in one call. See `DraftsAhead.draft_ahead`."""
        runner = self._made(path)
        if runner is not None:
            return runner.draft_ahead(tokens, positions, cache, path, behind, draws)
        return None

    def _made(self, path: DraftPath) -> DraftsAhead | None:
        """Return what drafts; None where nothing can. It is made anew only for another place."""
        if self._runner is not None:
            return self._runner
        place = self.split.device_and_dtype()
        if place == self._place or not is_small(self.split, path):
            return None
        with self._turn:
            if self._runner is None and place != self._place:
                self._place = place
                with suppress(InputError, ImportError):
                    self._runner = self.make(self.split)
            return self._runner
