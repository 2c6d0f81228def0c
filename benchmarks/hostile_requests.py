"""What no client should send to a server: one function for each kind of hostile request."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

CHAT = "/v1/chat/completions"
POSTED = (CHAT, "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")
MAX_HELD = 20
"""Connections that a client holds open with half of a body."""


@dataclass(slots=True)
class Attacker:
    """A client that means no good.

    Args:
        address: The server's address.
        key: A key of the server.
        dice: Decides what is sent.
        image: An image that is one, as a file's bytes.
    """

    address: str
    key: str
    dice: random.Random
    image: bytes
    held: list[socket.socket] = field(default_factory=list)
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        """Connect."""
        headers = {"Authorization": f"Bearer {self.key}"}
        self.client = httpx.Client(base_url=self.address, headers=headers, timeout=60)

    def maybe(self, share: float) -> bool:
        """Return true in a share of all cases."""
        return self.dice.random() < share

    def close(self) -> None:
        """Let go of everything."""
        self.client.close()
        for one in self.held:
            one.close()

    def post(self, content: Any, path: str = CHAT, **headers: str) -> httpx.Response:
        """Send a body: bytes as they are, anything else as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.client.post(
            path, content=body, headers={"Content-Type": "application/json", **headers}
        )

    def raw(self, content: bytes, *, seconds: float = 5) -> bytes:
        """Send bytes over a connection of their own; return what comes back, or nothing."""
        with self.connected(content) as one:
            one.settimeout(seconds)
            try:
                return one.recv(65536)
            except OSError:
                return b""

    def connected(self, content: bytes) -> socket.socket:
        """Return a connection over which bytes have been sent."""
        parts = urlsplit(self.address)
        one = socket.create_connection((parts.hostname or "", parts.port or 0), 10)
        one.sendall(content)
        return one

    def about(self, url: str, **fields: Any) -> dict[str, Any]:
        """Return a request about the image of a URL."""
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What is it?"},
        ]
        return {"messages": [{"role": "user", "content": parts}], "max_tokens": 2, **fields}


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Return a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(width: int, height: int, data: bytes) -> bytes:
    """Return a PNG of any size on paper, whose data may be of another."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", data), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def malformed_json(at: Attacker) -> Any:
    """Send what is no JSON, or none that anybody would write."""
    texts = [
        b"", b"{", b"nonsense", b"[]", b"null", b"1e999", b'"', b"\xff\xfe\x00", b"{}" * 1000,
        b"[" * 20_000, b'{"messages": ' * 5000, b'{"a": 1' + b"0" * 6000 + b"}",
        b'{"messages": NaN}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\u0000"}], "max_tokens": 2}',
        b'{"messages": [{"role": "user", "content": "a"}], "messages": 3}',
    ]  # fmt: skip
    return at.post(at.dice.choice(texts), at.dice.choice(POSTED))


def wrong_fields(at: Attacker) -> Any:
    """Send fields of other types and ranges, and fields that don't exist."""
    values = [
        None, True, -1, 0, 1e308, -1e308, 10**30, "x", "", [], {}, [[]], [None], {"a": None},
        "\ud800", "\x00", "é" * 1000, [1] * 1000, {"type": "json_schema"}, "9" * 400, 0.5,
    ]  # fmt: skip
    fields = [
        "messages", "model", "stream", "stream_options", "n", "stop", "seed", "temperature",
        "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "logit_bias",
        "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "response_format",
        "guided_json", "guided_regex", "guided_choice", "guided_grammar", "strategy", "image_size",
        "num_speculative_tokens", "return_drafted", "tools", "tool_choice", "user", "prompt",
        "input", "tokens", "echo", "priority", "min_tokens", "nonsense", "__proto__", "",
    ]  # fmt: skip
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}
    for _ in range(at.dice.randint(1, 3)):
        body[at.dice.choice(fields)] = at.dice.choice(values)
    return at.post(body, at.dice.choice((CHAT, CHAT, *POSTED)))


def hostile_forms(at: Attacker) -> Any:
    """Ask for replies of forms that can't be, or are huge."""
    deep: Any = {"type": "string"}
    for _ in range(at.dice.choice((5, 200))):
        deep = {"type": "array", "items": deep}
    forms: list[dict[str, Any]] = [
        {"guided_regex": "(a+)+" * 20 + "b"}, {"guided_regex": "a{1000}{1000}"},
        {"guided_regex": "(?=a)b"}, {"guided_regex": "["}, {"guided_json": deep},
        {"guided_json": {"$ref": "#"}}, {"guided_json": {"$ref": "http://127.0.0.1/a"}},
        {"guided_json": {"$ref": "file:///etc/passwd"}}, {"guided_json": "{"},
        {"guided_choice": []}, {"guided_choice": [""]}, {"guided_choice": ["a" * 5000] * 50},
        {"guided_grammar": "start: start start"}, {"guided_grammar": "%import common"},
        {"guided_json": {"enum": list(range(3000))}},
        {"guided_json": {"type": "integer", "minimum": 5, "maximum": 1}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": deep}}},
    ]  # fmt: skip
    body = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}
    return at.post(body | at.dice.choice(forms))


def broken_images(at: Attacker) -> Any:
    """Send images that are cut, changed, or none."""
    kind = at.dice.choice(("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"))
    content = io.BytesIO()
    Image.open(io.BytesIO(at.image)).convert("RGB").save(content, kind)
    data = bytearray(content.getvalue())
    match at.dice.randint(0, 3):
        case 0:
            del data[at.dice.randrange(len(data)) :]
        case 1:
            for _ in range(at.dice.randint(1, 200)):
                data[at.dice.randrange(len(data))] = at.dice.randrange(256)
        case 2:
            data = bytearray(at.dice.randbytes(at.dice.randint(0, 3000)))
        case 3:
            data[:20] = at.dice.randbytes(20)
    url = data_url(bytes(data))
    if at.maybe(0.2):
        url = url[: at.dice.randrange(len(url))]
    return at.post(at.about(url))


def bombs(at: Attacker) -> Any:
    """Send small files that are huge images, or say so."""
    sizes = [(9460, 9460), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (1, 2**30), (8000, 8000)]
    data = zlib.compress(bytes(10**7), 9)
    url = data_url(png(*at.dice.choice(sizes), data))
    parts = [{"type": "image_url", "image_url": {"url": url}}] * at.dice.choice((1, 1, 17))
    return at.post({"messages": [{"role": "user", "content": parts}], "max_tokens": 2})


def huge_prompts(at: Attacker) -> Any:
    """Ask about more than the model can read."""
    size = at.dice.choice((10_000, 100_000, 1_000_000))
    text = at.dice.choice(("a", "é", "word ", "<image>", "<|im_start|>", "\n"))
    content: Any = (text * size)[:size]
    if at.maybe(0.3):
        content = [{"type": "text", "text": "a"}] * (size // 100)
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    if at.maybe(0.3):
        body = {"messages": [{"role": "user", "content": "a"}] * (size // 100), "max_tokens": 2}
    return at.post(body)


def wrong_keys(at: Attacker) -> Any:
    """Ask without a key, or with another."""
    key = at.dice.choice(("", "x", at.key[:-1], f"{at.key} ", "é".encode().decode("latin-1")))
    scheme = at.dice.choice(("Bearer ", "Basic ", "", "bearer", "Bearer\t"))
    path = at.dice.choice((CHAT, "/metrics", "/v1/models", "/openapi.json", "/v1/completions"))
    headers = {"Authorization": f"{scheme}{key}".strip().encode("latin-1")}
    if key.strip() == at.key:
        headers = {"Authorization": b"Bearer wrong"}
    found = httpx.post(f"{at.address}{path}", json={}, headers=headers, timeout=60)
    assert found.status_code == 401, found.status_code  # noqa: PLR2004
    return found


def forged_urls(at: Attacker) -> Any:
    """Name images that only the server could read."""
    urls = [
        "http://169.254.169.254/latest/meta-data", "http://127.0.0.1/", "http://localhost:22/",
        "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://2130706433/", "http://0x7f.1/",
        "http://localhost.example:80/", "file:///etc/passwd", "file://localhost/etc/passwd",
        "file:/etc/passwd", "/etc/passwd", "../../etc/passwd", "gopher://127.0.0.1:25/",
        "ftp://127.0.0.1/", "http://user@127.0.0.1/", "http://127.0.0.1:99999/", "http://",
        "data:,", "data:image/png;base64,", "data:text/html,<script>", "javascript:alert(1)",
        "http://\x00/", "http://a" + "a" * 3000, "\\\\host\\share", "https://127.0.0.1:8000/v1",
    ]  # fmt: skip
    return at.post(at.about(at.dice.choice(urls)))


def vanishing(at: Attacker) -> Any:
    """Ask for a long reply, and leave at some moment."""
    body = at.about(data_url(at.image), stream=at.maybe(0.8)) | {"max_tokens": 100}
    content = json.dumps(body).encode()
    one = at.connected(head(at, len(content)) + content)
    one.settimeout(at.dice.random() * 0.3 + 0.001)
    with suppress(OSError):
        one.recv(at.dice.choice((1, 1000, 10_000)))
    if at.maybe(0.5):
        # With a reset, in the place of an orderly end.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def half_bodies(at: Attacker) -> Any:
    """Send half of a body; then leave, or stay and send no more."""
    content = json.dumps(at.about(data_url(at.image))).encode()
    part = content[: at.dice.randrange(len(content))]
    one = at.connected(head(at, len(content)) + part)
    at.held.append(one)
    if at.maybe(0.7):
        at.held.pop().close()
    while len(at.held) > MAX_HELD:
        at.held.pop(0).close()


def no_http(at: Attacker) -> Any:
    """Send what is no HTTP, or hardly any."""
    texts = [
        b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 500,
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: a\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /static/../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ]  # fmt: skip
    return at.raw(at.dice.choice(texts), seconds=1)


def wrong_places(at: Attacker) -> Any:
    """Ask for paths and by methods that there aren't."""
    methods = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE")
    paths = (
        CHAT, "/v1", "/v1/models/../../etc", "/v1/models/" + "a" * 3000, "/v1/models/%00",
        "/static/%2e%2e/app.py", "/static/..%2fapp.py", "//etc/passwd", "/docs", "/v1/engines",
        "/health", "/ready", "/openapi.json?" + "a" * 5000,
    )  # fmt: skip
    return at.client.request(at.dice.choice(methods), at.dice.choice(paths))


KINDS: dict[Callable[[Attacker], Any], int] = {
    malformed_json: 14,
    wrong_fields: 16,
    hostile_forms: 6,
    broken_images: 16,
    bombs: 3,
    huge_prompts: 3,
    wrong_keys: 14,
    forged_urls: 10,
    vanishing: 6,
    half_bodies: 6,
    no_http: 5,
    wrong_places: 5,
}
"""Kinds of requests, with how many of a hundred are of each."""


def head(at: Attacker, length: int) -> bytes:
    """Return the head of a request, as it goes over a connection."""
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {at.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def attack(at: Attacker, number: int) -> dict[str, Any]:
    """Send one request, and return what came of it.

    Args:
        at: The client.
        number: The request's number, for a report.
    """
    (kind,) = at.dice.choices(list(KINDS), list(KINDS.values()))
    started, status, text = time.monotonic(), "none", ""
    try:
        found = kind(at)
    except httpx.HTTPError as error:
        status = type(error).__name__
    else:
        if isinstance(found, httpx.Response):
            status, text = str(found.status_code), found.text
        elif found:
            status, text = found.split(b" ")[1].decode(), found.decode("latin-1")
    return {
        "number": number,
        "kind": kind.__name__,
        "status": status,
        "text": text,
        "seconds": time.monotonic() - started,
    }
