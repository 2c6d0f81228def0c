"""The gateway: reads a request, sends it to the replica that has its image, and streams the reply.

A replica may die at any time. Until the first bytes of a reply have been sent, its request is asked
again elsewhere, which its client never notices; after that the client is told.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.middleware.cors import CORSMiddleware

from fastvlm.cluster.affinity import Route, RunningReplicas, affinity_key
from fastvlm.serving.errors import ApiError
from fastvlm.serving.lifecycle import busy
from fastvlm.serving.limits import Limits, Receive, Scope, Send, read_keys
from fastvlm.serving.settings import ServerSettings, listed

LOGGER = logging.getLogger("fastvlm.serving")
ATTEMPTS = 5
"""How many replicas a request is sent to, one after the other, before it is given up."""
RETRY_SECONDS = 0.05
"""How long to wait before a request is asked again; twice as long each time."""
READY_SECONDS = 2.0
"""How long a replica may take to say that it is ready."""
LARGE_BODY_BYTES = 2**16
"""Larger bodies are read in a thread, so that other replies stream meanwhile."""
SCOPE_FIELDS = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path",
                "query_string", "root_path", "headers", "client", "server")  # fmt: skip
"""What of a request goes to a replica: what is plain data."""


class Gateway:
    """Answers requests through replicas.

    Args:
        replicas: The handle of their deployment.
        settings: How the server runs.
    """

    def __init__(self, replicas: Any, settings: ServerSettings) -> None:
        self.replicas, self.settings = replicas, settings

    def app(self) -> Any:
        """Return the application, as an ASGI server runs it."""
        keys = read_keys(self.settings.api_key_file)
        app: Any = Limits(self, keys, self.settings.max_body_bytes, self.settings.body_seconds)
        if origins := listed(self.settings.cors_origins):
            headers = ["X-Request-Id", "Retry-After"]
            app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"],
                                 allow_headers=["*"], expose_headers=headers)  # fmt: skip
        return app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        if scope["path"] == "/metrics" and scope["method"] == "GET":
            await self._metrics(send)
            return
        body = await whole_body(receive)
        route = Route(await key_of(body))
        plain = {name: scope[name] for name in SCOPE_FIELDS if name in scope}
        plain["headers"] = with_id(scope["headers"])
        leaving = asyncio.ensure_future(left(receive))
        answering = asyncio.ensure_future(self._answer(route, plain, body, send))
        try:
            await asyncio.wait({leaving, answering}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            leaving.cancel()
            answering.cancel()

    async def _answer(self, route: Route, scope: Scope, body: bytes, send: Send) -> None:
        reply = Reply(send)
        for attempt in range(ATTEMPTS):
            try:
                limit = READY_SECONDS if scope["path"] in ("/ready", "/health") else None
                async with (
                    asyncio.timeout(limit),
                    aclosing(self._asked(route, scope, body)) as found,
                ):
                    async for message in found:
                        await reply.take(message)
            except TimeoutError:
                await loading().response()(scope, nothing_more, send)
                return
            except BackPressureError:
                await busy().response()(scope, nothing_more, send)
                return
            except (RayError, RayServeException) as error:
                LOGGER.warning("a replica was lost", extra={"fields": {
                    "error": type(error).__name__, "begun": reply.begun, "attempt": attempt,
                }})  # fmt: skip
                if reply.begun:
                    await reply.break_off()
                    return
                await asyncio.sleep(RETRY_SECONDS * 2**attempt)
            else:
                return
        await lost().response()(scope, nothing_more, send)

    async def _asked(
        self, route: Route, scope: Mapping[str, Any], body: bytes
    ) -> AsyncGenerator[Mapping[str, Any]]:
        """Yield what a replica answers; its work ends when nobody reads on."""
        response = self.replicas.options(stream=True).answer.remote(route, scope, body)
        ended = False
        try:
            async for message in response:
                yield message
            ended = True
        finally:
            if not ended:
                response.cancel()

    async def _metrics(self, send: Send) -> None:
        """Answer with the metrics of all replicas, each with the label `replica`."""
        texts = {}
        for name in RunningReplicas.names:
            # One that is gone meanwhile has no metrics.
            with suppress(RayError, RayServeException, TimeoutError):
                async with asyncio.timeout(READY_SECONDS):
                    texts[name] = await self.replicas.metrics.remote(Route(replica=name))
        content = merged(texts)
        kind = [(b"content-type", b"text/plain; version=0.0.4")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": content.encode()})


class Reply:
    """A reply on its way to the client, of which nothing is sent before there is content.

    Args:
        send: Sends a message to the client.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Mapping[str, Any] | None = None
        self.begun = False
        """Whether the client has been sent anything."""

    async def take(self, message: Mapping[str, Any]) -> None:
        """Take a replica's message."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        if not self.begun and not message.get("body") and message.get("more_body"):
            return
        if not self.begun and self._start is not None:
            self.begun = True
            await self._send(dict(self._start))
        await self._send(dict(message))

    async def break_off(self) -> None:
        """Tell the client that the rest is lost: as an event of a stream, or by breaking off.

        Raises:
            ConnectionError: The reply is no stream of events, so that only a connection that ends
                too early tells.
        """
        headers = dict(self._start["headers"]) if self._start is not None else {}
        if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            raise ConnectionError("A replica was lost in the middle of a reply.")
        event = f"data: {json.dumps(lost().body)}\n\n".encode()
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def lost() -> ApiError:
    """Return what a client is told whose reply's replica was lost."""
    return ApiError(
        "The replica that made this reply was lost; ask again.",
        status=503,
        kind="server_error",
        code="replica_lost",
        headers={"Retry-After": "1"},
    )


def loading() -> ApiError:
    """Return the answer of a server none of whose replicas is ready."""
    return ApiError("No replica is ready.", status=503, kind="server_error", code="model_loading")


async def whole_body(receive: Receive) -> bytes:
    """Return a request's body."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return b"".join(parts)


async def key_of(body: bytes) -> str:
    """Return a body's key, see `affinity_key`."""
    if len(body) < LARGE_BODY_BYTES:
        return affinity_key(body)
    return await asyncio.to_thread(affinity_key, body)


async def left(receive: Receive) -> None:
    """Return once the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def nothing_more() -> dict[str, Any]:
    """Stand for a client that sends no more."""
    return {"type": "http.disconnect"}


def with_id(headers: Any) -> list[tuple[bytes, bytes]]:
    """Return a request's headers with an id among them, the client's own if there is one."""
    found = [(bytes(name), bytes(value)) for name, value in headers]
    if any(name.lower() == b"x-request-id" for name, _ in found):
        return found
    return [*found, (b"x-request-id", uuid.uuid4().hex.encode())]


def merged(texts: Mapping[str, str]) -> str:
    """Return the metrics of several replicas as one text, each sample with its replica's name.

    Args:
        texts: Each replica's metrics by its name.
    """
    families: dict[str, list[str]] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            head = [f"# HELP {name} {family.documentation}", f"# TYPE {name} {family.type}"]
            lines = families.setdefault(name, head)
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                listed_labels = ",".join(f'{key}="{value}"' for key, value in labels.items())
                lines.append(f"{sample.name}{{{listed_labels}}} {sample.value}")
    return "".join(f"{line}\n" for lines in families.values() for line in lines)
