"""Replies that a server keeps, where its operator wants them, to train the next draft on.

A line is a conversation as `train draft --replies data` reads it: the reply's text after a user's
turn without content. Of the prompt there is a hash, which tells equal prompts; of images, nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from fastvlm.data.journal import append_line
from fastvlm.decoding.request import Request
from fastvlm.functional.errors import first_line
from fastvlm.functional.files import storage_errors
from fastvlm.vlm import VisionLanguageModel

LOGGER = logging.getLogger("fastvlm.serving")


class KeptReplies:
    """Appends a server's replies to a file of its own in a folder, in a thread of its own.

    Args:
        vlm: The model.
        folder: The folder, which any number of servers may share.

    Raises:
        StorageError: It can't be made.
    """

    def __init__(self, vlm: VisionLanguageModel, folder: Path) -> None:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.vlm, self.file = vlm, folder / f"replies-{uuid.uuid4().hex[:12]}.jsonl"
        self._writing = ThreadPoolExecutor(1, "fastvlm-replies")
        self._failed = False

    def __enter__(self) -> KeptReplies:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what is left."""
        self._writing.shutdown()

    def add(self, request: Request) -> None:
        """Keep a reply, if it came to its own end: a draft would learn a false one."""
        if (
            request.finish_reason == "stop"
            and request.output_token_ids[-1] in request.end_token_ids
        ):
            self._writing.submit(self._write, request)

    def _write(self, request: Request) -> None:
        try:
            self._append(request)
        except Exception as error:  # noqa: BLE001 (whatever it is, the server goes on)
            if not self._failed:
                # Said once, as each further reply would say it again.
                reason = {"reason": first_line(error)}
                LOGGER.warning("replies are not kept", extra={"fields": reason})
            self._failed = True

    def _append(self, request: Request) -> None:
        text = self.vlm.reply(request).text.strip()
        if not text:
            return
        prompt = json.dumps(list(request.prompt_token_ids)).encode()
        row = {
            "messages": [{"role": "user", "content": []}, {"role": "assistant", "content": text}],
            "prompt_sha256": hashlib.sha256(prompt).hexdigest(),
            "proposed": sum(request.proposed),
            "accepted": sum(request.accepted),
        }
        append_line(self.file, row)
