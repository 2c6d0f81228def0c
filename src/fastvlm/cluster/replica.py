"""A replica: the whole application of `fastvlm serve`, called through Ray instead of a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from fastvlm.cluster.affinity import Route
from fastvlm.serving.app import Server
from fastvlm.serving.lifecycle import Lifecycle
from fastvlm.serving.request_log import RequestLog, write_log

Message = MutableMapping[str, Any]


class Replica:
    """A model behind OpenAI's API, in a process of Ray Serve's.

    Args:
        load: Loads the model.
        quiet: Whether only warnings and errors are logged.
    """

    def __init__(self, load: Callable[[], Server], quiet: bool = False) -> None:
        self.server = load()
        write_log(as_json=self.server.settings.log_json, quiet=quiet)
        life = Lifecycle(lambda: self.server, self.server.settings)
        life.begin(self.server)
        self.app = RequestLog(life)

    async def answer(self, route: Route, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """Answer a request, as ASGI messages.

        Args:
            route: What led the request here.
            scope: The request, as ASGI has it.
            body: Its body.
        """
        del route
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            # The client leaves when this call is cancelled.
            return await asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                await self.app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await running
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    async def metrics(self, route: Route) -> str:
        """Return this replica's metrics as Prometheus reads them."""
        del route
        return self.server.metrics.text().decode()

    def check_health(self) -> None:
        """Let Ray Serve replace a replica whose engine has stopped.

        Raises:
            RuntimeError: It has.
        """
        if not self.server.engine.alive:
            raise RuntimeError("The engine's thread has ended.")
