"""The gateway without Ray's processes: what becomes of requests whose replica is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

import httpx
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from fastvlm.cluster import gateway
from fastvlm.cluster.affinity import Route, RunningReplicas
from fastvlm.cluster.gateway import Gateway, merged
from fastvlm.serving.settings import ServerSettings

STREAM = [
    {"type": "http.response.start", "status": 200,
     "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]},
    {"type": "http.response.body", "body": b"data: one\n\n", "more_body": True},
    {"type": "http.response.body", "body": b"data: two\n\n", "more_body": True},
    {"type": "http.response.body", "body": b"", "more_body": False},
]  # fmt: skip
LOST = RayActorError()


class Replicas:
    """Stands for a deployment's handle: each call answers as it is told to.

    Args:
        answers: The messages of each call, and perhaps an error behind them; the last one stays.
    """

    def __init__(self, answers: Sequence[Sequence[Any]]) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Route, dict[str, Any], bytes]] = []
        self.cancelled = 0

    def options(self, *, stream: bool) -> Replicas:
        assert stream
        return self

    @property
    def answer(self) -> Replicas:
        return self

    def remote(self, route: Route, scope: dict[str, Any], body: bytes) -> Replicas:
        self.calls.append((route, scope, body))
        self.now = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return self

    async def __aiter__(self) -> AsyncIterator[Any]:
        for message in self.now:
            if isinstance(message, Exception):
                raise message
            if message is None:
                await asyncio.sleep(60)
            yield message

    def cancel(self) -> None:
        self.cancelled += 1


def ask(replicas: Replicas, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    async def answered() -> httpx.Response:
        app = Gateway(replicas, ServerSettings(max_body_bytes=1024)).app()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, **{"json": {"prompt": "Hi."}, **options})

    return asyncio.run(answered())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(gateway, "READY_SECONDS", 0.05)
    monkeypatch.delenv("FASTVLM_API_KEY", raising=False)


@pytest.mark.parametrize("before", [[], STREAM[:1]])
def test_a_request_that_has_not_begun_to_stream_is_asked_again(before: list[Any]) -> None:
    replicas = Replicas([[*before, LOST], [LOST], STREAM])
    said = ask(replicas)
    assert (said.status_code, said.text) == (200, "data: one\n\ndata: two\n\n")
    assert len(replicas.calls) == 3
    assert len({(route.key, body) for route, _, body in replicas.calls}) == 1


def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    replicas = Replicas([[*STREAM[:2], LOST], STREAM])
    said = ask(replicas)
    first, last, _ = said.text.split("\n\n")
    assert first == "data: one"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert len(replicas.calls) == 1


def test_a_body_that_has_begun_is_broken_off() -> None:
    whole = [{**STREAM[0], "headers": [(b"content-type", b"application/json")]}, *STREAM[1:2]]
    with pytest.raises(ConnectionError):
        ask(Replicas([[*whole, LOST]]))


def test_a_request_that_no_replica_survives() -> None:
    replicas = Replicas([[LOST]])
    said = ask(replicas)
    assert said.status_code == 503
    assert said.json()["error"]["code"] == "replica_lost"
    assert len(replicas.calls) == gateway.ATTEMPTS


def test_too_many_requests() -> None:
    said = ask(Replicas([[BackPressureError(num_queued_requests=3, max_queued_requests=3)]]))
    assert (said.status_code, said.headers["retry-after"]) == (503, "1")


def test_no_replica_is_ready() -> None:
    replicas = Replicas([[None]])
    assert ask(replicas, "/ready").status_code == 503
    assert replicas.cancelled == 1


def test_limits_hold_before_a_replica_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas([STREAM])
    assert ask(replicas, content=b"a" * 1025).status_code == 413
    monkeypatch.setenv("FASTVLM_API_KEY", "secret")
    assert ask(replicas).status_code == 401
    assert not replicas.calls
    assert ask(replicas, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_request_has_an_id() -> None:
    replicas = Replicas([STREAM])
    ask(replicas, headers={"X-Request-Id": "mine"})
    ask(replicas)
    first, second = (dict(scope["headers"])[b"x-request-id"] for _, scope, _ in replicas.calls)
    assert first == b"mine"
    assert len(second) == 32


def test_metrics_of_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '# HELP n_total N.\n# TYPE n_total counter\nn_total{model_name="m"} 2.0\n'
    assert merged({"a": text, "b": text}) == (
        "# HELP n_total N.\n# TYPE n_total counter\n"
        'n_total{model_name="m",replica="a"} 2.0\nn_total{model_name="m",replica="b"} 2.0\n'
    )
    monkeypatch.setattr(RunningReplicas, "names", ())
    assert merged({}) == ""
