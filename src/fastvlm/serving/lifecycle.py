"""A server's life: it loads its model, answers, and stops once replies are at their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from threading import Thread
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from fastvlm.serving.engine_thread import stopping
from fastvlm.serving.errors import ApiError
from fastvlm.serving.limits import Receive, Scope, Send
from fastvlm.serving.settings import ServerSettings

if TYPE_CHECKING:
    from fastvlm.serving.app import Server

LAST_EVENT_SECONDS = 2.0
"""How long clients may take to be sent the error that ends their replies."""
LOGGER = logging.getLogger("fastvlm.serving")


class Lifecycle:
    """Answers while there is a model, and says so where there is none yet, or soon no more.

    Args:
        load: Loads the model; called in a thread of its own once the server listens.
        settings: How the server runs.
        on_ready: Called in the event loop once the model is there.
        on_failure: Called in the event loop with the error, if the model can't be loaded.
    """

    def __init__(
        self,
        load: Callable[[], Server],
        settings: ServerSettings,
        *,
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.load, self.settings = load, settings
        self.on_ready, self.on_failure = on_ready, on_failure
        self.server: Server | None = None
        self.stopping = False
        self.in_progress = 0
        """Requests with a body that are being answered."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._app: Any = None
        self._running = ExitStack()
        """What ends with the server."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or say why not."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        early = self._early(scope)
        if early is not None:
            await early(scope, receive, send)
        elif scope["method"] == "POST":
            await self._counted(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _early(self, scope: Scope) -> JSONResponse | None:
        """Return the answer of a server that isn't ready, or is busy; None to hand on."""
        path, server = scope["path"], self.server
        state = "loading" if server is None else "stopping" if self.stopping else "ok"
        if path in ("/health", "/ready") and state != "ok":
            return JSONResponse({"status": state}, 503 if path == "/ready" else 200)
        if server is None:
            return ApiError(
                "The model is being loaded; try again in a moment.",
                status=503,
                kind="server_error",
                code="model_loading",
                headers={"Retry-After": "5"},
            ).response()
        if scope["method"] != "POST":
            return None
        if self.stopping:
            refused = stopping()
            refused.headers = {**(refused.headers or {}), "Connection": "close"}
            return refused.response()
        if self.in_progress >= server.vlm.engine.max_slots + self.settings.max_waiting:
            return busy().response()
        return None

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.in_progress += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self.in_progress -= 1
            if not self.in_progress:
                self._idle.set()

    async def _live(self, receive: Receive, send: Send) -> None:
        """Load the model when the server starts, and end the engine's thread when it stops."""
        await receive()
        loading = Thread(target=self._load, args=(asyncio.get_running_loop(),), daemon=True)
        if self.server is None:
            loading.start()
        else:
            self.begin(self.server)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.stopping = True
        await asyncio.to_thread(self._running.close)
        await send({"type": "lifespan.shutdown.complete"})

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            server = self.load()
        except BaseException as error:  # noqa: BLE001 (it is raised again where the server was started)
            told: Callable[[], None] = _calling(self.on_failure, error)
        else:
            told = _calling(self.begin, server)
        # A loop that has been closed since has nobody to tell.
        if not loop.is_closed():
            loop.call_soon_threadsafe(told)

    def begin(self, server: Server) -> None:
        """Answer from now on with a model that is loaded."""
        if self.stopping:
            return
        self._app = server.inner()
        for part in (server.kept, server.engine, server.watch):
            if part is not None:
                self._running.enter_context(part)
        self.server = server
        self.on_ready()

    async def stop(self) -> None:
        """Refuse what comes from now on, and return once nothing is in progress.

        Replies that take longer than `drain_seconds` end with an error.
        """
        self.stopping = True
        LOGGER.info("stopping", extra={"fields": {"in_progress": self.in_progress}})
        if await self._is_idle_within(self.settings.drain_seconds) or self.server is None:
            return
        LOGGER.warning("stopped before the end", extra={"fields": {"replies": self.in_progress}})
        self.server.engine.stop()
        await self._is_idle_within(LAST_EVENT_SECONDS)

    async def _is_idle_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


def busy() -> ApiError:
    """Return what is answered where too many others wait."""
    return ApiError(
        "The server is busy; try again in a moment.",
        status=503,
        kind="overloaded_error",
        headers={"Retry-After": "1"},
    )


def _calling(function: Callable[[Any], None], argument: Any) -> Callable[[], None]:
    return lambda: function(argument)
