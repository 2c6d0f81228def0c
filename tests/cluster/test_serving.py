"""Two replicas on Ray Serve: the server as clients know it, and what they notice of a loss."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

import httpx
import openai

from fastvlm.cluster.serving import Fleet, deploy, fleet_on
from fastvlm.serving.settings import ServerSettings
from tests.cluster.making import load_model, load_server
from tests.models import VISUAL_TOKENS
from tests.serving.serving import asked

REPLICA = b"ray::ServeReplica:fastvlm:replica"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def settings() -> ServerSettings:
    return ServerSettings(port=free_port())


@pytest.fixture(scope="module")
def address(ray: Any, settings: ServerSettings) -> Iterator[str]:
    assert ray.is_initialized()
    with fleet_on(load_server, settings, Fleet(2, max_slots=4), quiet=True):
        yield f"http://127.0.0.1:{settings.port}"


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def replicas() -> list[int]:
    """Return the processes of the replicas."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(REPLICA):
                found.append(int(folder.name))
    return found


def counted(address: str, metric: str) -> dict[str, float]:
    """Return a metric of each replica."""
    text = httpx.get(f"{address}/metrics").text
    found = re.findall(rf'^vllm:{metric}{{.*replica="(\w+)"}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_the_client_streams_what_the_model_says(client: openai.OpenAI) -> None:
    vlm = load_model()
    for seed in range(3):
        stream = client.chat.completions.create(
            model="small", messages=asked(seed), max_tokens=12, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        whole = client.chat.completions.create(
            model="small", messages=asked(seed), max_tokens=12, temperature=0
        )
        assert "".join(pieces) == whole.choices[0].message.content
    said = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "Hello."}],
        max_tokens=12,
        temperature=0,
    )
    assert said.choices[0].message.content == vlm.generate("Hello.", max_new_tokens=12).text


def test_errors_are_the_applications_own(client: openai.OpenAI, address: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="small", messages=asked(0), temperature=-1)
    assert httpx.get(f"{address}/ready").json() == {"status": "ok"}
    assert "fastvlm" in httpx.get(f"{address}/").text


def test_questions_about_an_image_meet_its_cache(client: openai.OpenAI, address: str) -> None:
    before, known = counted(address, "prefix_cache_hits_total"), 0
    seeds = range(10, 22)
    for text in ("What is it?", "What colour is it?", "Where is it?"):
        for seed in seeds:
            said = client.chat.completions.create(
                model="small", messages=asked(seed, text), max_tokens=2, temperature=0
            )
            details = said.usage and said.usage.prompt_tokens_details
            known += bool(details and (details.cached_tokens or 0) > VISUAL_TOKENS)
    assert known == 2 * len(seeds)
    after = counted(address, "prefix_cache_hits_total")
    assert all(after[name] > before[name] for name in after), "both replicas had their share"


def test_a_client_that_leaves_frees_its_slot(client: openai.OpenAI, address: str) -> None:
    stream = client.chat.completions.create(
        model="small", messages=asked(1), max_tokens=200, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    for _ in range(100):
        if not sum(counted(address, "num_requests_running").values()):
            return
        time.sleep(0.05)
    pytest.fail("A request goes on that nobody reads.")


def outcome(client: openai.OpenAI, seed: int, tokens: int) -> str:
    """Return what becomes of a streamed request: whole, told or lost."""
    begun = False
    try:
        for chunk in client.chat.completions.create(
            model="small", messages=asked(seed), max_tokens=tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        ):  # fmt: skip
            begun = True
            if chunk.choices and chunk.choices[0].finish_reason:
                return "whole"
    except openai.APIError as error:
        return "told" if begun and "lost; ask again" in str(error) else f"lost: {error!r}"
    return "cut off"


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load(client: openai.OpenAI, address: str) -> None:
    known = counted(address, "num_requests_running")
    ended = threading.Event()

    def kill() -> None:
        time.sleep(1)
        os.kill(replicas()[0], signal.SIGKILL)
        ended.set()

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(12) as pool:
        found = Counter(pool.map(lambda seed: outcome(client, seed, 100), range(120)))
    killer.join()
    assert ended.is_set()
    assert set(found) <= {"whole", "told"}, found
    assert found["whole"] > 100
    deadline = time.monotonic() + 60
    while len(counted(address, "num_requests_running")) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    again = counted(address, "num_requests_running")
    assert len(again) == 2
    assert len(again.keys() & known.keys()) == 1


@pytest.mark.slow
def test_an_update_loses_no_request(
    client: openai.OpenAI, address: str, settings: ServerSettings
) -> None:
    known = counted(address, "num_requests_running")
    updated = threading.Event()

    def ask(seed: int) -> Counter[str]:
        found: Counter[str] = Counter()
        while not updated.is_set():
            found[outcome(client, seed, 40)] += 1
        return found

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, seed) for seed in range(4)]
        deploy(load_server, settings, Fleet(2, max_slots=5), quiet=True)
        updated.set()
        found = sum((one.result() for one in asking), Counter())
    assert set(found) == {"whole"}, found
    assert not counted(address, "num_requests_running").keys() & known.keys()


def test_bodies_of_streams_are_events(address: str) -> None:
    body = {"messages": asked(2), "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as said:
        lines = [line for line in said.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("error" not in json.loads(line[6:]) for line in lines[:-1])
