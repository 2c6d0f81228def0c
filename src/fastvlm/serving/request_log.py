"""A name for each request, and a line of the log for each answer.

Prompts, images, replies and keys are never logged; of an error there is the place in the code, not
its message, which may quote a prompt.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from traceback import extract_tb
from typing import Any, TextIO

from openai.types import CompletionUsage

from fastvlm.functional.errors import shortened
from fastvlm.serving.errors import SERVER_ERROR, api_error
from fastvlm.serving.limits import Receive, Scope, Send

LOGGER = logging.getLogger("fastvlm.serving")
"""Where the server's lines go."""
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What a client's `X-Request-Id` may be."""
POLLED = frozenset({"/health", "/ready", "/metrics"})
"""Paths that are asked for all the time, and logged at the level DEBUG."""

_noted: ContextVar[dict[str, Any]] = ContextVar("noted")
"""What the request at hand has noted for its line."""


def note_usage(usage: CompletionUsage, finish_reasons: Sequence[str | None]) -> None:
    """Add the tokens of the request at hand to its line, and why its replies ended."""
    noted = _noted.get(None)
    if noted is None:
        return
    drafts, prompt = usage.completion_tokens_details, usage.prompt_tokens_details
    noted |= {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": prompt.cached_tokens if prompt else None,
        "completion_tokens": usage.completion_tokens,
        "accepted_tokens": drafts.accepted_prediction_tokens if drafts else None,
        "rejected_tokens": drafts.rejected_prediction_tokens if drafts else None,
        "finish_reasons": list(finish_reasons),
    }


class RequestLog:
    """Gives each request an id, the client's own if it is sane, and logs its answer.

    Args:
        app: The application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request, and log what became of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
        status: int | None = None
        unreachable = False

        async def named(message: Any) -> None:
            nonlocal status, unreachable
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                names = {name for name, _ in own}
                others = [pair for pair in message["headers"] if pair[0].lower() not in names]
                message = {**message, "headers": [*others, *own]}
            try:
                await send(message)
            except Exception:
                unreachable = True
                raise

        fields: dict[str, Any] = {
            "request_id": request_id,
            "method": scope["method"],
            "path": shortened(scope["path"], 200),
        }
        noted: dict[str, Any] = {}
        started = time.perf_counter()
        token = _noted.set(noted)
        error: Exception | None = None
        try:
            await self.app(scope, receive, named)
        except Exception as raised:  # noqa: BLE001 (whatever failed, its client is answered)
            if unreachable:
                # The client broke the protocol: that is no failure of the server.
                noted["unreachable"] = True
                return
            error = raised
            if status is None:
                await api_error(error).response()(scope, receive, named)
        finally:
            _noted.reset(token)
            fields |= {"status": status, "seconds": round(time.perf_counter() - started, 4)}
            fields |= noted
            LOGGER.log(level_of(scope["path"], status, error), "request", extra={"fields": fields},
                       exc_info=error)  # fmt: skip


def level_of(path: str, status: int | None, error: Exception | None) -> int:
    """Return the level of an answer's line."""
    if error is not None or (status is not None and status == SERVER_ERROR):
        return logging.ERROR
    return logging.DEBUG if path in POLLED else logging.INFO


class JsonLines(logging.Formatter):
    """Writes each record as a JSON object on a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        found: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(found | _error_of(record), ensure_ascii=False, default=str)


class PlainLines(logging.Formatter):
    """Writes each record as a line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = dict(getattr(record, "fields", {}))
        words = [clock]
        if record.levelno >= logging.WARNING:
            words.append(record.levelname)
        if "method" in fields:
            words += [str(fields.pop(name)) for name in ("method", "path", "status")]
            words.append(f"{fields.pop('seconds'):.3f} s")
        else:
            words.append(record.getMessage())
        words += [f"{name}={value}" for name, value in (fields | _error_of(record)).items()]
        return " ".join(words)


def _error_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the kind of a record's error, and where in the code it was raised."""
    if not record.exc_info or record.exc_info[1] is None:
        return {}
    error = record.exc_info[1]
    places = [f"{one.filename}:{one.lineno} {one.name}" for one in extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "traceback": places}


def write_log(*, as_json: bool, quiet: bool = False, to: TextIO | None = None) -> None:
    """Write the server's lines, and those of uvicorn, from now on.

    Args:
        as_json: Whether each is a JSON object.
        quiet: Whether only warnings and errors are written.
        to: Where they are written; None for standard error.
    """
    handler = logging.StreamHandler(to or sys.stderr)
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    for name, level in (("fastvlm.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING if quiet else level)
