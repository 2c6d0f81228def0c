"""A server loads, and stops: what it says meanwhile, and what becomes of replies that stream."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.serving.app import Server
from fastvlm.serving.process import Process
from fastvlm.serving.settings import ServerSettings
from fastvlm.vlm import VisionLanguageModel
from tests.models import small_vlm
from tests.serving.serving import slowed
from tests.serving.test_remote_images import self_signed

TOKENS = 40


@pytest.fixture(scope="module")
def vlm() -> Iterator[VisionLanguageModel]:
    found = small_vlm(torch.float32, max_slots=4)
    with slowed(found):
        yield found


def body(**fields: Any) -> dict[str, Any]:
    """Return a request whose reply streams for `TOKENS` tokens."""
    usual = {"max_tokens": TOKENS, "temperature": 0, "strategy": "autoregressive"}
    return {"messages": [{"role": "user", "content": "Hello."}], **usual, **fields}


class Running:
    """A process's server in a thread, where signals are given to it by hand."""

    def __init__(self, load: Callable[[], Server], settings: ServerSettings) -> None:
        self.ready = threading.Event()
        self.error: BaseException | None = None
        self.process = Process(load, settings, lambda _: self.ready.set())
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        while not self.process.started and self.thread.is_alive():
            time.sleep(0.01)

    def _run(self) -> None:
        try:
            self.process.serve_until_stopped()
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            self.error = error

    @property
    def address(self) -> str:
        return self.process.address.rstrip("/")

    def signal(self) -> None:
        self.process.handle_exit(signal.SIGTERM, None)


@contextmanager
def running(vlm: VisionLanguageModel, **settings: Any) -> Iterator[Running]:
    given = ServerSettings(port=0, **settings)
    found = Running(lambda: Server(vlm, "small", given), given)
    try:
        assert found.ready.wait(20)
        yield found
    finally:
        if found.thread.is_alive() and not found.process.life.stopping:
            found.signal()
        found.thread.join(20)
        assert not found.thread.is_alive()


def events(lines: Iterator[str]) -> Iterator[Any]:
    """Yield the events of a stream; the last is `[DONE]` where it came to its end."""
    for line in lines:
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def stream(address: str) -> Any:
    return httpx.stream("POST", f"{address}/v1/chat/completions", json=body(stream=True))


def text(found: list[Any]) -> str:
    return "".join(
        one["choices"][0]["delta"].get("content", "") for one in found if isinstance(one, dict)
    )


def test_while_the_model_is_loaded(vlm: VisionLanguageModel) -> None:
    loaded, settings = threading.Event(), ServerSettings(port=0)

    def load() -> Server:
        assert loaded.wait(20)
        return Server(vlm, "small", settings)

    server = Running(load, settings)
    try:
        found = httpx.get(f"{server.address}/ready")
        assert (found.status_code, found.json()) == (503, {"status": "loading"})
        assert httpx.get(f"{server.address}/health").json() == {"status": "loading"}
        found = httpx.post(f"{server.address}/v1/chat/completions", json=body())
        assert (found.status_code, found.json()["error"]["code"]) == (503, "model_loading")
        assert int(found.headers["retry-after"]) >= 1
        assert found.headers["x-request-id"]
        assert not server.ready.is_set()
        loaded.set()
        assert server.ready.wait(10)
        assert httpx.get(f"{server.address}/ready").json() == {"status": "ok"}
        assert httpx.post(f"{server.address}/v1/chat/completions", json=body()).status_code == 200
    finally:
        loaded.set()
        server.signal()
        server.thread.join(20)
    assert server.error is None


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> Server:
        raise CheckpointError("There is no model.")

    server = Running(load, ServerSettings(port=0))
    server.thread.join(20)
    assert isinstance(server.error, CheckpointError)


def test_streams_come_to_their_end(vlm: VisionLanguageModel) -> None:
    with running(vlm) as server, httpx.Client(base_url=server.address) as other:
        expected = other.post("/v1/chat/completions", json=body()).json()
        with stream(server.address) as response:
            found = events(response.iter_lines())
            shown = [next(found) for _ in range(3)]
            server.signal()
            assert other.get("/ready").status_code == 503
            assert httpx.get(f"{server.address}/ready").json() == {"status": "stopping"}
            assert httpx.get(f"{server.address}/metrics").status_code == 200
            refused = other.post("/v1/chat/completions", json=body())
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                503,
                "server_stopping",
            )
            assert int(refused.headers["retry-after"]) >= 1
            shown += found
        assert shown[-1] == "[DONE]"
        assert text(shown) == expected["choices"][0]["message"]["content"]
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert (server.error, server.process.exit_code) == (None, None)


def test_past_the_limit_replies_end_with_an_error(vlm: VisionLanguageModel) -> None:
    statuses: list[Any] = []

    def whole(address: str) -> None:
        found = httpx.post(f"{address}/v1/chat/completions", json=body())
        statuses.append((found.status_code, found.json()["error"]["code"]))

    with running(vlm, drain_seconds=0.2) as server:
        waiting = threading.Thread(target=whole, args=(server.address,))
        waiting.start()
        with stream(server.address) as response:
            found = events(response.iter_lines())
            next(found)
            server.signal()
            *_, last = found
        waiting.join()
        assert last["error"]["code"] == "server_stopping"
        assert statuses == [(503, "server_stopping")]
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert server.process.exit_code is None
    assert not vlm.engine.slots


def test_a_client_that_reads_nothing_does_not_hold_the_server_up(vlm: VisionLanguageModel) -> None:
    with running(vlm, drain_seconds=0.1) as server:
        port = int(server.address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\n"
                b"Host: localhost\r\nContent-Length: 9\r\n\r\n{"
            )
            time.sleep(0.2)
            started = time.monotonic()
            server.signal()
            server.thread.join(20)
            assert time.monotonic() - started < 8
            assert not server.thread.is_alive()


def test_https(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "localhost")
    with running(vlm, tls_cert=cert, tls_key=key) as server:
        assert server.address.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(cert))
        address = server.address.replace("127.0.0.1", "localhost")
        assert httpx.get(f"{address}/ready", verify=trusting).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.address.replace("https:", "http:"))


def test_certificates_that_are_none(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "localhost")
    (tmp_path / "text").write_text("no certificate")
    for given in (
        {"tls_cert": cert},
        {"tls_key": key},
        {"tls_cert": tmp_path / "text", "tls_key": key},
        {"tls_cert": cert, "tls_key": tmp_path / "none"},
    ):
        with pytest.raises(InputError):
            Process(lambda: None, ServerSettings(port=0, **given), print)  # type: ignore[arg-type, return-value]


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=str(port)):
            Process(lambda: None, ServerSettings(port=port), print)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="nowhere"):
        Process(lambda: None, ServerSettings(host="nowhere.invalid"), print)  # type: ignore[arg-type, return-value]


LAUNCH = """
import sys, torch
from fastvlm.serving.app import Server
from fastvlm.serving.process import Process
from fastvlm.serving.settings import ServerSettings
from tests.models import small_vlm
from tests.serving.serving import slowed

vlm = small_vlm(torch.float32)
slow = slowed(vlm, 0.05)
slow.__enter__()
settings = ServerSettings(port=0, drain_seconds=float(sys.argv[1]))
tell = lambda address: print(address, flush=True)
Process(lambda: Server(vlm, "small", settings), settings, tell).serve_until_stopped()
"""


@contextmanager
def launched(drain_seconds: float) -> Iterator[tuple[Any, str]]:
    """Run a server in a process of its own; the process and the address."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *(one for one in sys.path if one)])
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(drain_seconds)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip().rstrip("/")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_process_that_is_terminated_finishes_its_streams() -> None:
    with launched(30) as (process, address):
        with stream(address) as response:
            found = events(response.iter_lines())
            next(found)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert httpx.get(f"{address}/ready").status_code == 503
            *_, last = found
        assert last == "[DONE]"
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_process_ends_streams_past_its_limit() -> None:
    with launched(0.3) as (process, address):
        with stream(address) as response:
            found = events(response.iter_lines())
            next(found)
            process.send_signal(signal.SIGTERM)
            *_, last = found
        assert last["error"]["code"] == "server_stopping"
        assert process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_at_once(second: signal.Signals) -> None:
    with launched(30) as (process, address), stream(address) as response:
        found = events(response.iter_lines())
        next(found)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(second)
        assert process.wait(20) == 128 + second
        assert time.monotonic() - started < 1.5
