"""Errors as OpenAI's API has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fastvlm.functional.errors import FastVlmError

TIMED_OUT = 408
"""The status of requests that take too long."""
SERVER_ERROR = 500
"""The status of errors that are the server's own."""


class ApiError(Exception):
    """What a client is answered instead of a reply.

    Args:
        message: A sentence for the client.
        status: The HTTP status.
        kind: OpenAI's type of error.
        param: The field that is wrong, if one is.
        code: OpenAI's code, if there is one.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind = message, status, kind
        self.param, self.code, self.headers = param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body, self.status, dict(self.headers or {}))


def api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error; nothing of the server's own errors but that."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FastVlmError):
        return ApiError(str(error))
    if isinstance(error, TimeoutError):
        return ApiError(
            "The request took longer than the server allows.",
            status=TIMED_OUT,
            kind="timeout_error",
        )
    return ApiError("The server failed on this request.", status=SERVER_ERROR, kind="server_error")


async def on_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with an error of ours, or of the server's own."""
    return api_error(error).response()


async def on_invalid(_: Request, error: Exception) -> JSONResponse:
    """Answer a body that isn't of the endpoint's shape, naming the field that is wrong."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return ApiError("The body is not valid JSON.").response()
    # Where a field has one of several types, the one that a value comes closest to tells most.
    first = max(errors, key=lambda one: len(_path(one, error.body)))
    param = ".".join(map(str, _path(first, error.body))) or None
    if first["type"] == "extra_forbidden":
        return ApiError(f"There is no field {param!r} here.", param=param).response()
    where = "" if param is None else f"{param}: "
    return ApiError(f"{where}{first['msg']}.", param=param).response()


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Return which field an error is about, without the names of types that it might have."""
    found: list[str | int] = []
    at, (_, *steps) = body, error["loc"]
    for number, step in enumerate(steps, 1):
        if (isinstance(at, dict) and step in at) or (
            isinstance(at, list) and step in range(len(at))
        ):
            at = at[step]
            found.append(step)
        elif error["type"] == "missing" and number == len(steps):
            found.append(step)
    return found


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    """Answer where there is no such endpoint or method."""
    assert isinstance(error, HTTPException)
    return ApiError(f"{error.detail}.", status=error.status_code).response()
