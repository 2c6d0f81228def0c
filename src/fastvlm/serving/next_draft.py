"""A new draft in the place of the one that is served, without a restart."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.digests import digest_of_weights
from fastvlm.functional.errors import FastVlmError
from fastvlm.functional.packed import PackedLinear, pack
from fastvlm.language.packed import PACKED_BYTES
from fastvlm.vlm import VisionLanguageModel

LOGGER = logging.getLogger("fastvlm.serving")
DRAFT_FILE_NAMES = ("config.json", "model.safetensors")
LABEL_DIGITS = 12


class DraftWatch:
    """Looks at a draft's directory now and then, and takes a draft that has changed.

    Requests that decode go on with the draft that they began with, those that come take the new
    one; no token depends on it. One that can't be loaded is logged, and the one before stays.

    Args:
        vlm: The model.
        directory: The draft's directory, as `train draft` replaces it: all at once.
        seconds: How often to look.
    """

    def __init__(self, vlm: VisionLanguageModel, directory: Path, seconds: float) -> None:
        self.vlm, self.directory, self.seconds = vlm, directory, seconds
        self._known = self._state()
        self._ended = Event()
        self._thread = Thread(target=self._run, name="fastvlm-draft", daemon=True)

    def __enter__(self) -> DraftWatch:
        """Start to look."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def look(self) -> bool:
        """Take the draft if it is another than before; return whether it is served now."""
        state = self._state()
        if state is None or state == self._known:
            return False
        self._known = state
        try:
            network = load_draft(self.directory, self.vlm.model)
        except FastVlmError as error:
            LOGGER.warning("the new draft is not taken", extra={"fields": {"reason": str(error)}})
            return False
        before = self.vlm.network
        if before is None or any(isinstance(part, PackedLinear) for part in before.modules()):
            pack([network], PACKED_BYTES)
        self.vlm.network = network
        self.vlm.strategies.replace_network(network)
        LOGGER.info("a new draft is served", extra={"fields": {"draft": draft_label(network)}})
        return True

    def _state(self) -> list[tuple[int, int, int]] | None:
        """Return what tells the draft's files from others; None while one is missing."""
        try:
            found = [(self.directory / name).stat() for name in DRAFT_FILE_NAMES]
        except OSError:
            return None
        return [(one.st_mtime_ns, one.st_size, one.st_ino) for one in found]

    def _run(self) -> None:
        while not self._ended.wait(self.seconds):
            try:
                self.look()
            except Exception:  # the draft before is served on, and the next one is looked for
                LOGGER.exception("the new draft is not taken")


def draft_label(network: ImitationNetwork) -> str:
    """Return a draft's name in metrics and logs: a digest of its weights."""
    return digest_of_weights(network)[:LABEL_DIGITS]
