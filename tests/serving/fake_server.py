"""A server that answers by the contract of `fastvlm serve` with canned replies, slowly.

It serves the page too, and `python -m tests.serving.fake_server` is for working on that by hand.
Words in the last question choose what happens: `busy`, `lost`, `refused`, `differ` and `long`.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "src" / "fastvlm" / "serving" / "page"
POLICY = "default-src 'self'; img-src 'self' blob: data:"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
REPLY = (
    "A person on skis stands on a snowy slope, wearing a red jacket and dark trousers. They hold a"
    " pole in each hand and look towards the camera, smiling. Behind them the snow is marked by"
    " many tracks, and the light is bright, as on a clear morning in late winter."
)
ACCEPTED = (3, 4, 1, 4, 2, 0, 4, 3, 4, 2)
PROPOSED = 4
MODEL = {
    "id": "fastvlm/example",
    "object": "model",
    "created": 0,
    "owned_by": "fastvlm",
    "fastvlm": {
        "strategies": ["autoregressive", "imitation", "prompt-lookup"],
        "default_strategy": "imitation",
        "image_sizes": [256, 512, 1024],
        "images": True,
        "max_images": 4,
    },
}


class FakeServer(ThreadingHTTPServer):
    """What it was asked, how many clients hung up, and how long a pass of its model takes."""

    daemon_threads = True

    def __init__(self, port: int = 0, pass_seconds: float = 0.01, key: str | None = None):
        super().__init__(("127.0.0.1", port), _Handler)
        self.pass_seconds = pass_seconds
        self.key = key
        self.requests: list[dict[str, Any]] = []
        self.hung_up = 0
        self.recovered = False  # whether it no longer is busy or lost
        self.goes_on = threading.Event()  # cleared, replies halt after a few tokens
        self.goes_on.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


@contextmanager
def serving(**options: Any) -> Iterator[FakeServer]:
    server = FakeServer(**options)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        """The requests are kept, not printed."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/v1/models":
            if self._allowed():
                self._json(HTTPStatus.OK, {"object": "list", "data": [MODEL]})
            return
        name = "index.html" if path == "/" else path.removeprefix("/static/")
        file = PAGE / name
        if "/" in name or not file.is_file():
            self._error(HTTPStatus.NOT_FOUND, f"Nothing at {path}.")
            return
        self._send(HTTPStatus.OK, TYPES[file.suffix], file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.server.requests.append(body)
        question = body["messages"][-1]["content"][-1]["text"].lower()
        fails = not self.server.recovered
        if "busy" in question and fails:
            self._error(HTTPStatus.SERVICE_UNAVAILABLE, "Too many requests.", {"Retry-After": "3"})
        elif "refused" in question and fails:
            self._error(HTTPStatus.BAD_REQUEST, "The image cannot be read.")
        else:
            try:
                self._stream(body, question, lost="lost" in question and fails)
            except (BrokenPipeError, ConnectionResetError):
                self.server.hung_up += 1

    def _stream(self, body: dict[str, Any], question: str, *, lost: bool) -> None:
        ordinary = body["strategy"] == "autoregressive"
        text = REPLY * 20 if "long" in question else REPLY
        if "differ" in question and not ordinary:
            text = text.replace("red", "blue")
        tokens = re.findall(r" ?[^ ]{1,5}", text)[: body["max_tokens"]]
        self._start(HTTPStatus.OK, "text/event-stream")
        time.sleep(self.server.pass_seconds * (4 if ordinary else 2))
        accepted, done = [], 0
        while done < len(tokens):
            time.sleep(self.server.pass_seconds)
            kept = 0 if ordinary or not done else ACCEPTED[len(accepted) % len(ACCEPTED)]
            if not ordinary and done:
                accepted.append(kept)
            for index, token in enumerate(tokens[done : done + kept + 1]):
                self._event(_chunk(token, drafted=index < kept))
            done += kept + 1
            if lost and done > 5:
                return
            if done > 5:
                self.server.goes_on.wait(timeout=60)
        reason = "length" if len(tokens) == body["max_tokens"] else "stop"
        self._event(
            {"choices": [{"index": 0, "delta": {}, "finish_reason": reason, "drafted": []}]}
        )
        kept = sum(accepted)
        self._event(
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": 281,
                    "completion_tokens": len(tokens),
                    "completion_tokens_details": {
                        "accepted_prediction_tokens": kept,
                        "rejected_prediction_tokens": PROPOSED * len(accepted) - kept,
                    },
                    "prompt_tokens_details": {"cached_tokens": 0 if ordinary else 256},
                },
                "fastvlm": {
                    "accepted_per_cycle": accepted,
                    "proposed_per_cycle": [PROPOSED] * len(accepted),
                },
            }
        )
        self.wfile.write(b"data: [DONE]\n\n")

    def _allowed(self) -> bool:
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self._error(HTTPStatus.UNAUTHORIZED, "This server asks for an API key.")
        return False

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _error(
        self, status: HTTPStatus, message: str, headers: dict[str, str] | None = None
    ) -> None:
        error = {"message": message, "type": "error", "param": None, "code": None}
        self._json(status, {"error": error}, headers)

    def _json(
        self, status: HTTPStatus, data: object, headers: dict[str, str] | None = None
    ) -> None:
        self._send(status, "application/json", json.dumps(data).encode(), headers)

    def _send(
        self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self._start(status, kind, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def _start(self, status: HTTPStatus, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()


def _chunk(token: str, *, drafted: bool) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": token}, "finish_reason": None, "drafted": [drafted]}
    return {"object": "chat.completion.chunk", "choices": [choice]}


if __name__ == "__main__":
    with serving(port=8765, pass_seconds=0.06) as running:
        sys.stdout.write(f"{running.url}\n")
        sys.stdout.flush()
        threading.Event().wait()
