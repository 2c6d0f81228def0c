"""What is refused before an endpoint sees it: wrong keys, and bodies that are too large."""

from __future__ import annotations

import hmac
import os
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
    """Refuses requests without a key, and bodies that are too large, however they come.

    Args:
        app: The application.
        keys: The API keys; none for a server that needs none.
        max_body_bytes: The largest body, in bytes.
    """

    def __init__(self, app: Any, keys: Sequence[str], max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
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
        taken = 0
        too_large = ApiError(f"The body is larger than {self.max_body_bytes:,} bytes.", status=413)

        async def counted() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body_bytes:
                raise too_large
            return message

        async def answered(message: MutableMapping[str, Any]) -> None:
            # What reads the body makes an answer of its own of the error.
            if taken <= self.max_body_bytes:
                await send(message)
            elif message["type"] == "http.response.start":
                await too_large.response()(scope, receive, send)

        await self.app(scope, counted, answered)

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
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return ApiError(f"The body is larger than {self.max_body_bytes:,} bytes.", status=413)
        return None

    def _known(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        # All are compared, each in constant time, so that the time tells nothing.
        same = [hmac.compare_digest(key.strip(), own) for own in self.keys]
        return scheme.lower() == b"bearer" and any(same)
