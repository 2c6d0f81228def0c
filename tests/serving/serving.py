"""A server in a thread of the test's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from fastvlm.serving.app import Server
from fastvlm.serving.settings import ServerSettings
from fastvlm.vlm import VisionLanguageModel

NAME = "small"


@contextmanager
def served(vlm: VisionLanguageModel, **settings: Any) -> Iterator[str]:
    """Serve a model on a free port; its address."""
    app = Server(vlm, NAME, ServerSettings(port=0, **settings)).app()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
