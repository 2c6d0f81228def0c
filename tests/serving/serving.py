"""A server in a thread of the test's own, and what it is asked."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from fastvlm.serving.app import Server
from fastvlm.serving.settings import ServerSettings
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import SCENE_PROMPT
from fastvlm_example.scenes import render, sample

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


@contextmanager
def slowed(vlm: VisionLanguageModel, seconds: float = 0.03) -> Iterator[None]:
    """Let a model's replies take a while: some seconds more a step."""
    engine: Any = vlm.engine
    step = engine.step

    def slowly(**options: Any) -> Any:
        time.sleep(seconds)
        return step(**options)

    engine.step = slowly
    try:
        yield
    finally:
        engine.step = step


def image_url(seed: int) -> str:
    """Return a rendered scene as a data URL."""
    content = io.BytesIO()
    render(sample(seed), 128).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def asked(seed: int, text: str = SCENE_PROMPT) -> list[Any]:
    """Return a question about a scene."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": image_url(seed)}},
                {"type": "text", "text": text},
            ],
        }
    ]
