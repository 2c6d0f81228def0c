"""What is refused before an endpoint sees it: wrong keys, and bodies too large or too slow."""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fastvlm.functional.errors import InputError
from fastvlm.serving.errors import ApiError

KEYS_VARIABLE = "FASTVLM_API_KEY"
"""The environment variable with the API keys, separated by commas."""
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Paths that need no key, besides those of the page."""
PROBES = frozenset({"/health", "/ready"})
"""Paths that tell nothing that another site's page may not know."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def read_keys(file: Path | None) -> list[str]:
    """Return the API keys of a file, or of the environment.

    Raises:
        InputError: The file can't be read, or holds no key.
    """
    if file is None:
        given = os.environ.get(KEYS_VARIABLE, "").split(",")
        return [key.strip() for key in given if key.strip()]
    try:
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise InputError(f"The API keys in {file} can't be read: {error}.") from error
    keys = [key for key in keys if key]
    if not keys:
        raise InputError(f"There is no API key in {file}.")
    return keys


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Limits:
    """Refuses requests without a key, and bodies that are too large or slow, however they come.

    A server without keys answers on this machine alone, and by its own names alone: a site that
    a browser here visits could otherwise let its name lead to this server, and read the replies.

    Args:
        app: The application.
        keys: The API keys; none for a server that needs none.
        max_body_bytes: The largest body, in bytes.
        body_seconds: The longest that a body may take to arrive, in seconds.
    """

    def __init__(
        self, app: Any, keys: Sequence[str], max_body_bytes: int, body_seconds: float
    ) -> None:
        self.app, self.max_body_bytes, self.body_seconds = app, max_body_bytes, body_seconds
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refusal(scope["path"], headers)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        body = _Body(receive, self.max_body_bytes, self.body_seconds)

        replaced = False

        async def answered(message: MutableMapping[str, Any]) -> None:
            # What reads the body makes an answer of its own of the error. One that has begun
            # before goes on to its end.
            nonlocal replaced
            if body.refused is not None and message["type"] == "http.response.start":
                replaced = True
                await body.refused.response()(scope, receive, send)
            elif not replaced:
                await send(message)

        await self.app(scope, body.receive, answered)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        open_path = path in OPEN_PATHS or path.startswith("/static/")
        if self.keys and not open_path and not self._known(headers.get(b"authorization", b"")):
            return ApiError(
                "The API key is missing or wrong.",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not self.keys and path not in PROBES and not _names_loopback(headers.get(b"host", b"")):
            return ApiError(
                "A server without API keys answers to this machine's own names alone, such as"
                " localhost; give it a key.",
                status=403,
                code="host_not_allowed",
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return too_large(self.max_body_bytes)
        return None

    def _known(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        # All are compared, each in constant time, so that the time tells nothing.
        same = [hmac.compare_digest(key.strip(), own) for own in self.keys]
        return scheme.lower() == b"bearer" and any(same)


class _Body:
    """A request's body, as it arrives.

    Args:
        receive: Returns the next message of the client.
        max_bytes: The largest body, in bytes.
        seconds: The longest that it may take to arrive, in seconds.
    """

    def __init__(self, receive: Receive, max_bytes: int, seconds: float) -> None:
        self._receive, self.max_bytes, self.seconds = receive, max_bytes, seconds
        self.taken, self.whole = 0, False
        self.until = time.monotonic() + seconds
        self.refused: ApiError | None = None
        """Why it is refused, if it is."""

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the client's next message.

        Raises:
            ApiError: The body is too large, or takes too long.
        """
        if self.whole:
            # Who waits now waits for the client to leave.
            return await self._receive()
        try:
            async with asyncio.timeout(self.until - time.monotonic()):
                message = await self._receive()
        except TimeoutError as error:
            self.refused = ApiError(
                f"The body took longer than {self.seconds:g} s to arrive.",
                status=408,
                kind="timeout_error",
                headers={"Connection": "close"},
            )
            raise self.refused from error
        self.taken += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.taken > self.max_bytes:
            self.refused = too_large(self.max_bytes)
            raise self.refused
        return message


def too_large(max_bytes: int) -> ApiError:
    """Return the error of a body that is too large."""
    return ApiError(f"The body is larger than {max_bytes:,} bytes.", status=413)


def _names_loopback(host: bytes) -> bool:
    """Return whether a `Host` header names this machine."""
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return is_loopback(name)
