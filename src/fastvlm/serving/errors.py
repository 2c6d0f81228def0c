"""Errors as OpenAI's API has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fastvlm.functional.errors import FastVlmError


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
            "The request took longer than the server allows.", status=408, kind="timeout_error"
        )
    return ApiError("The server failed on this request.", status=500, kind="server_error")


async def on_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with an error of ours, or of the server's own."""
    return api_error(error).response()


async def on_invalid(_: Request, error: Exception) -> JSONResponse:
    """Answer a body that isn't of the endpoint's shape, naming the first field that is wrong."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(one) for one in first["loc"] if one != "body") or None
    if first["type"] == "extra_forbidden":
        return ApiError(f"There is no field {param!r} here.", param=param).response()
    if first["type"] == "json_invalid":
        return ApiError("The body is not valid JSON.").response()
    where = "" if param is None else f"{param}: "
    return ApiError(f"{where}{first['msg']}.", param=param).response()


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    """Answer where there is no such endpoint or method."""
    assert isinstance(error, HTTPException)
    return ApiError(f"{error.detail}.", status=error.status_code).response()
