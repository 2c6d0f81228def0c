"""A long mixed load on a server: memory, slots, and its counts beside those of its clients.

Clients of every kind ask at random: streams and whole replies, with new images, known ones and
none, several choices, sampled replies, forms, log-probabilities, refused requests, and clients that
go away amid a stream. The server's memory is read while they do. At the end no slot may be taken,
and what the server has counted must be what its clients have.

Run `python benchmarks/serving_soak.py [--minutes N] [--clients N] [--rest S] [--threads N]
[--json FILE]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai

from fastvlm.evaluation.measuring import hardware
from fastvlm_example import SCENE_PROMPT
from serving_load import image_urls, server

IMAGES = 256
"""Different images, of which a request has one, two or none."""
MAX_TOKENS = 64
SETTLE_SECONDS = 30
"""The longest that slots may take to be free once all clients are done."""
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "things": {"type": "integer"}},
    "required": ["colour", "things"],
    "additionalProperties": False,
}
KINDS = {
    "whole": {},
    "stream": {"stream": True},
    "gone": {"stream": True},
    "choices": {"n": 3, "temperature": 1.0, "seed": 1},
    "sampled": {"stream": True, "temperature": 0.8, "top_p": 0.9, "seed": 2},
    "form": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    },
    "log-probabilities": {"logprobs": True, "top_logprobs": 3},
    "refused": {"temperature": 9},
}
"""Kinds of requests, and their fields."""


class Clients:
    """Clients of a server, and what they have counted.

    Args:
        port: The server's.
        urls: Images as data URLs.
        rest: The longest that each rests between two requests, in seconds.
    """

    def __init__(self, port: int, urls: list[str], rest: float) -> None:
        self.address, self.urls, self.rest = f"http://127.0.0.1:{port}", urls, rest
        self.client = openai.AsyncOpenAI(
            base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=300
        )
        self.model = ""
        """The model's name in the API."""
        self.asked: Counter[str] = Counter()
        self.replies = self.prompt_tokens = self.tokens = 0
        """Of requests that were answered to the end."""
        self.left = self.left_tokens = 0
        """Streams that were left, and tokens that had come of them."""
        self.wrong: list[str] = []

    async def one(self, number: int, until: float) -> None:
        """Ask again and again."""
        chance = random.Random(number)
        while time.monotonic() < until:
            kind = chance.choice([*KINDS])
            self.asked[kind] += 1
            content: list[dict[str, Any]] = [{"type": "text", "text": SCENE_PROMPT}]
            for _ in range(chance.choice((0, 1, 1, 1, 2))):
                # Some images are asked about often, most once in a while.
                image = int(IMAGES * chance.random() ** 3)
                url = {"url": self.urls[image]}
                content.insert(0, {"type": "image_url", "image_url": url})
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": chance.randint(1, MAX_TOKENS),
                "temperature": 0,
            } | KINDS[kind]
            try:
                await self.ask(kind, body)
            except openai.APIError as error:
                self.wrong.append(f"{kind}: {type(error).__name__}: {error}"[:300])
            await asyncio.sleep(chance.random() * self.rest)

    async def ask(self, kind: str, body: dict[str, Any]) -> None:
        """Ask once, and count what comes."""
        create = self.client.chat.completions.create
        if kind == "refused":
            try:
                await create(**body)
            except openai.BadRequestError:
                return
            self.wrong.append("a request that makes no sense was answered")
            return
        if kind == "gone":
            stream = await create(**body, extra_body={"return_drafted": True})
            came = 0
            async for chunk in stream:
                came += len(getattr(chunk.choices[0], "drafted", None) or ())
                if came:
                    break
            await stream.close()
            self.left, self.left_tokens = self.left + 1, self.left_tokens + came
            return
        if body.get("stream"):
            usage = None
            async for chunk in await create(**body, stream_options={"include_usage": True}):
                usage = chunk.usage or usage
        else:
            usage = (await create(**body)).usage
        if usage is None:
            self.wrong.append(f"{kind}: the stream has no end")
            return
        rows = body.get("n", 1)
        self.replies += rows
        self.tokens += usage.completion_tokens
        self.prompt_tokens += rows * usage.prompt_tokens

    async def metrics(self) -> dict[str, float]:
        """Return what the server has counted: sums over labels, without the prefix `vllm:`."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"{self.address}/metrics")).text
        found: Counter[str] = Counter()
        for line in text.splitlines():
            if line.startswith("vllm:"):
                name, value = line.removeprefix("vllm:").rsplit(" ", 1)
                found[name.partition("{")[0]] += float(value)
        return dict(found)


def resident_mib(process: int) -> float:
    """Return the memory that a process holds, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


async def soaked(clients: Clients, process: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was seen.

    Args:
        clients: The clients.
        process: The server's process.
        options: Those of the command line.
    """
    clients.model = (await clients.client.models.list()).data[0].id
    begun = time.monotonic()
    until = begun + 60 * options.minutes
    tasks = [asyncio.ensure_future(clients.one(n, until)) for n in range(options.clients)]
    memory: list[tuple[float, float]] = []
    while time.monotonic() < until:
        memory.append(((time.monotonic() - begun) / 60, resident_mib(process)))
        minute = int(memory[-1][0])
        if len(memory) == 1 or minute != int(memory[-2][0]):
            say(
                f"{minute} of {options.minutes:g} min: {memory[-1][1]:.0f} MiB,"
                f" {sum(clients.asked.values())} requests, {len(clients.wrong)} wrong"
            )
        await asyncio.sleep(5)
    await asyncio.gather(*tasks)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        counted = await clients.metrics()
        busy = counted["num_requests_running"] + counted["num_requests_waiting"]
        if not busy or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    return {
        "minutes": options.minutes,
        "clients": options.clients,
        "requests": dict(clients.asked),
        "wrong": clients.wrong[:20],
        "slots_taken_at_the_end": busy,
        "memory_mib": summary(memory),
        "counts": {
            "replies": [clients.replies, counted["request_success_total"] - clients.left],
            "prompt_tokens": [clients.prompt_tokens, counted["prompt_tokens_total"]],
            "generation_tokens": [clients.tokens, counted["generation_tokens_total"]],
            "streams_left": clients.left,
            "tokens_of_streams_left": clients.left_tokens,
        },
    }


def summary(memory: list[tuple[float, float]]) -> dict[str, float]:
    """Return the medians of memory in quarters of the run, and the peak, in MiB."""
    quarter = max(len(memory) // 4, 1)
    values = [value for _, value in memory]
    found = {
        f"quarter_{number + 1}": statistics.median(values[number * quarter :][:quarter])
        for number in range(min(4, len(values)))
    }
    return {name: round(value, 1) for name, value in {**found, "peak": max(values)}.items()}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--rest", type=float, default=1.0, help="seconds")
    parser.add_argument("--model", type=Path, help="if not the example model")
    parser.add_argument("--draft", type=Path, help="if not the example model's")
    parser.add_argument("--threads", type=int, help="of the server")
    parser.add_argument("--size", type=int, default=192, help="side of the images in pixels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    urls = image_urls(IMAGES, options.size)
    with server(options) as (port, process):
        clients = Clients(port, urls, options.rest)
        found = {
            "hardware": hardware(),
            **asyncio.run(soaked(clients, process, options)),
        }
    say(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    counts = found["counts"]
    if (
        found["wrong"]
        or found["slots_taken_at_the_end"]
        or counts["replies"][0] != counts["replies"][1]
    ):
        raise SystemExit("Something went wrong.")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
