"""What a server takes of a request, from whom, and what it says of it in its log."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from fastvlm.serving.errors import ApiError
from fastvlm.serving.limits import Limits
from fastvlm.serving.request_log import JsonLines, PlainLines, write_log
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.models import VISUAL_TOKENS
from tests.serving.serving import served

ORIGIN = "https://app.example"


def png(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (width, height)).save(content, "PNG")
    return content.getvalue()


def body(*images: bytes, **fields: Any) -> dict[str, Any]:
    """Return a request about images."""
    urls = [f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in images]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.append({"type": "text", "text": "What is it?"})
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 2, **fields}


def scene() -> bytes:
    content = io.BytesIO()
    render(sample(1), 128).save(content, "PNG")
    return content.getvalue()


def ask(address: str, asked: dict[str, Any]) -> Any:
    return httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=60)


@pytest.mark.parametrize(
    ("settings", "images", "code"),
    [
        ({"max_images": 1}, 2, None),
        ({"max_image_bytes": 100}, 1, "image_too_large"),
        ({"max_image_pixels": 128 * 128 * 2 - 1}, 2, "image_too_large"),
        ({"max_image_tokens": 2 * VISUAL_TOKENS - 1}, 2, "too_many_image_tokens"),
    ],
)
def test_limits_of_images(
    vlm: VisionLanguageModel, settings: dict[str, Any], images: int, code: str | None
) -> None:
    before = len(vlm.engine.slots)
    with served(vlm, **settings) as address:
        found = ask(address, body(*[scene()] * images))
        assert found.status_code == 400
        error = found.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", code)
        assert error["param"].startswith("messages")
    assert len(vlm.engine.slots) == before


def test_what_just_fits_is_taken(vlm: VisionLanguageModel) -> None:
    limits = {"max_images": 2, "max_image_bytes": len(scene())}
    limits |= {"max_image_pixels": 2 * 128 * 128, "max_image_tokens": 2 * VISUAL_TOKENS}
    with served(vlm, **limits) as address:
        assert ask(address, body(scene(), scene())).status_code == 200


def bomb(width: int, height: int) -> bytes:
    """Return a PNG that says it is huge, and holds little."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "size", [(9460, 9460), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (1, 10**8)]
)
def test_decompression_bombs(address: str, size: tuple[int, int]) -> None:
    started = time.monotonic()
    found = ask(address, body(bomb(*size)))
    assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_image")
    assert time.monotonic() - started < 5


def test_a_body_that_takes_too_long(vlm: VisionLanguageModel) -> None:
    with served(vlm, body_seconds=0.3) as address:
        parts = urlsplit(address)
        with socket.create_connection((parts.hostname or "", parts.port or 0), 10) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            said = b"".join(iter(lambda: client.recv(4096), b""))
        head, _, content = said.partition(b"\r\n\r\n")
        assert b" 408 " in head.splitlines()[0]
        assert json.loads(content)["error"]["type"] == "timeout_error"
        # Nothing is left of it.
        assert ask(address, body()).status_code == 200


def test_requests_that_only_begin_do_not_pile_up(vlm: VisionLanguageModel) -> None:
    with served(vlm, max_waiting=0) as address:
        parts = urlsplit(address)
        clients = []
        for _ in range(vlm.engine.max_slots):
            client = socket.create_connection((parts.hostname or "", parts.port or 0), 10)
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\n"
                b"Host: localhost\r\nContent-Length: 9\r\n\r\n"
            )
            clients.append(client)
        deadline = time.monotonic() + 10
        while (found := ask(address, body())).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found.status_code == 503
        assert int(found.headers["retry-after"]) >= 1
        for client in clients:
            client.close()
        while (found := ask(address, body())).status_code == 503 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found.status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:9000", 200), ("127.0.0.1:80", 200), ("[::1]:80", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("10.0.0.1", 403), ("", 403),
    ],
)  # fmt: skip
def test_a_server_without_keys_has_this_machines_names_only(
    address: str, host: str, status: int
) -> None:
    found = httpx.get(f"{address}/v1/models", headers={"Host": host})
    assert found.status_code == status
    assert httpx.get(f"{address}/health", headers={"Host": host}).status_code == 200


def test_with_a_key_any_name_is_answered(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVLM_API_KEY", "a, b")
    with served(vlm) as address:
        headers = {"Host": "models.example", "Authorization": "Bearer b"}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200


def preflight(address: str, origin: str) -> Any:
    wanted = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    wanted["Access-Control-Request-Headers"] = "authorization,content-type"
    return httpx.options(f"{address}/v1/chat/completions", headers=wanted)


def test_pages_of_other_origins(vlm: VisionLanguageModel, address: str, tmp_path: Any) -> None:
    assert "access-control-allow-origin" not in preflight(address, ORIGIN).headers
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with served(vlm, cors_origins=f"{ORIGIN}, https://b.example", api_key_file=keys) as allowing:
        found = preflight(allowing, ORIGIN)
        assert found.status_code == 200
        assert found.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in found.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in found.headers
        assert "access-control-allow-origin" not in preflight(allowing, "https://c.example").headers
        # A page is told what is wrong, too.
        refused = httpx.get(f"{allowing}/v1/models", headers={"Origin": ORIGIN})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in refused.headers["access-control-expose-headers"].lower()


def test_every_answer_has_an_id_and_no_type_is_guessed(address: str) -> None:
    for path in ("/health", "/v1/models", "/nothing", "/metrics", "/", "/static/main.js"):
        found = httpx.get(f"{address}{path}")
        assert len(found.headers.get_list("x-request-id")) == 1, path
        assert found.headers.get_list("x-content-type-options") == ["nosniff"], path
    given = httpx.get(f"{address}/health", headers={"X-Request-Id": "my-request.1"})
    assert given.headers["x-request-id"] == "my-request.1"
    for insane in ("a b", "x" * 200, "a;b", '"', ""):
        found = httpx.get(f"{address}/health", headers={"X-Request-Id": insane})
        assert found.headers["x-request-id"] != insane
    page = httpx.get(f"{address}/").headers
    assert "default-src 'self'" in page["content-security-policy"]
    assert page["referrer-policy"] == "no-referrer"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Yield what is written to the log."""
    written = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("fastvlm.serving", "uvicorn")]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    write_log(as_json=True, to=written)
    yield written
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def logged(written: io.StringIO, request_id: str) -> dict[str, Any]:
    """Return the line of a request, which is written once its answer has been sent."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in written.getvalue().splitlines():
            if (found := json.loads(line)).get("request_id") == request_id:
                return found
        time.sleep(0.01)
    raise AssertionError(written.getvalue())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_line_without_what_was_said(
    vlm: VisionLanguageModel, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setenv("FASTVLM_API_KEY", "key-of-mine")
    with served(vlm) as address:
        asked = body(scene(), stream=stream, temperature=0, strategy="early-exit", max_tokens=9)
        asked["messages"][0]["content"][1]["text"] = "confidential"
        asked |= {"stream_options": {"include_usage": True}} if stream else {}
        headers = {"Authorization": "Bearer key-of-mine", "X-Request-Id": "r1"}
        found = httpx.post(
            f"{address}/v1/chat/completions?key=key-of-mine", json=asked, headers=headers
        )
        line = logged(lines, "r1")
    events = [one for one in found.text.splitlines() if one.startswith("data: {")]
    usage = (json.loads(events[-1][6:]) if stream else found.json())["usage"]
    details = usage["completion_tokens_details"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["seconds"] > 0
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"] == 9
    assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert line["accepted_tokens"] == details["accepted_prediction_tokens"]
    assert line["finish_reasons"] == ["length"]
    for secret in (
        "confidential",
        "key-of-mine",
        asked["messages"][0]["content"][0]["image_url"]["url"][-40:],
    ):
        assert secret not in lines.getvalue()


def test_a_failure_tells_its_client_nothing_and_the_log_where_it_was(
    vlm: VisionLanguageModel, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("confidential")

    with served(vlm) as address:
        with monkeypatch.context() as patched:
            patched.setattr(vlm, "planned_request", fail)
            headers = {"X-Request-Id": "r2"}
            found = httpx.post(f"{address}/v1/chat/completions", json=body(), headers=headers)
        assert found.status_code == 500
        assert found.headers["x-request-id"] == "r2"
        line = logged(lines, "r2")
        assert ask(address, body()).status_code == 200
    assert line["level"] == "error"
    assert line["error"] == "RuntimeError"
    assert any(place.endswith(" fail") for place in line["traceback"])
    for text in (found.text, lines.getvalue()):
        assert "confidential" not in text
    assert "Traceback" not in found.text


def test_lines_for_people() -> None:
    record = logging.LogRecord("fastvlm.serving", logging.INFO, "", 1, "request", None, None)
    record.fields = {"request_id": "r", "method": "GET", "path": "/a", "status": 200, "seconds": 1}
    assert PlainLines().format(record).endswith(" GET /a 200 1.000 s request_id=r")
    assert json.loads(JsonLines().format(record))["path"] == "/a"


def test_the_document_of_the_endpoints(address: str) -> None:
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/metrics", "/health", "/ready"} <= paths.keys()


def test_an_answer_that_has_begun_is_not_cut_by_a_body_that_does_not_come() -> None:
    async def early(_: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with suppress(ApiError):
            await receive()
        await send({"type": "http.response.body", "body": b"all of it"})

    async def asked() -> list[Any]:
        sent: list[Any] = []

        async def never() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/health", "headers": [(b"host", b"localhost")]}
        await Limits(early, [], 100, 0.01)(scope, never, send)
        return sent

    start, body = asyncio.run(asked())
    assert (start["status"], body["body"]) == (200, b"all of it")
