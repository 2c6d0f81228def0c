"""Clients of a server in one process, which read what came once all of it has."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastvlm_example import SCENE_PROMPT

MAX_TOKENS = 96


@dataclass(slots=True)
class Answer:
    """What came back of one request, as it came.

    Args:
        image: The number of its image.
        sent: When it was sent, in seconds.
        parts: When each part of the answer came, and the part.
    """

    image: int
    sent: float
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    """When each piece of text came."""
    tokens: int = 0
    error: str | None = None

    def read(self) -> None:
        """Read the parts, once all have come: clients that parse meanwhile slow the server down."""
        whole = b"".join(part for _, part in self.parts)
        ends = list(itertools.accumulate(len(part) for _, part in self.parts))
        came, done = iter(zip(ends, (when for when, _ in self.parts), strict=True)), False
        end, when = next(came, (0, self.sent))
        if not whole.startswith(b"HTTP/1.1 200"):
            self.error = whole[:400].decode(errors="replace")
            return
        for match in re.finditer(rb"^data: (.*?)\r?\n\r?\n", whole, re.MULTILINE):
            while match.end() > end:
                end, when = next(came)
            if match[1] == b"[DONE]":
                done = True
                continue
            content = json.loads(match[1])
            if "error" in content:
                self.error = content["error"]["message"]
                return
            self.tokens = (content.get("usage") or {}).get("completion_tokens", self.tokens)
            for choice in content["choices"]:
                if choice["delta"].get("content"):
                    self.text += choice["delta"]["content"]
                    self.times.append(when)
        self.error = None if done else "the answer has no end"
        self.parts.clear()

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces that came apart, as the field counts inter-token latency."""
        apart = sorted(set(self.times))
        return [after - before for before, after in itertools.pairwise(apart)]

    @property
    def seconds_per_token(self) -> float:
        """Seconds per token after the first."""
        if not self.times:
            return 0.0
        return (self.times[-1] - self.times[0]) / max(self.tokens - 1, 1)


@dataclass(frozen=True)
class Client:
    """Asks a server about images.

    Args:
        port: The server's port on this machine.
        images: The images as data URLs.
    """

    port: int
    images: Sequence[str]

    def body(self, image: int, strategy: str, *, cache: bool) -> bytes:
        """Return an HTTP request."""
        content = [
            {"type": "image_url", "image_url": {"url": self.images[image]}},
            {"type": "text", "text": SCENE_PROMPT},
        ]
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": MAX_TOKENS,
                "temperature": 0,
                "stream": True,
                "strategy": strategy,
                "stream_options": {"include_usage": True},
                "cache": cache,
            }
        ).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def ask(self, image: int, strategy: str, *, cache: bool = False) -> Answer:
        """Ask once, and return the answer, whose parts are still to be read."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            answer = Answer(image, time.perf_counter())
            writer.write(self.body(image, strategy, cache=cache))
            while part := await reader.read(1 << 16):
                answer.parts.append((time.perf_counter(), part))
            return answer
        finally:
            writer.close()

    async def closed_loop(
        self, clients: int, images: Sequence[int], strategy: str, *, cache: bool = False
    ) -> tuple[list[Answer], float]:
        """Ask about images, each client after its last answer.

        Returns:
            The answers, and the seconds that all took.
        """
        waiting, answers = iter(images), list[Answer]()

        async def one() -> None:
            for image in waiting:
                answers.append(await self.ask(image, strategy, cache=cache))

        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return answers, time.perf_counter() - begun

    async def open_loop(
        self, rate: float, seconds: float, strategy: str
    ) -> tuple[list[Answer], float]:
        """Ask at random times, `rate` requests a second on average, at least once.

        See `closed_loop`.
        """
        chance, at, tasks = random.Random(0), 0.0, list[asyncio.Task[Answer]]()
        begun = time.perf_counter()
        while (at := at + chance.expovariate(rate)) < seconds or not tasks:
            await asyncio.sleep(max(begun + at - time.perf_counter(), 0))
            image = len(tasks) % len(self.images)
            tasks.append(asyncio.ensure_future(self.ask(image, strategy)))
        return await asyncio.gather(*tasks), time.perf_counter() - begun
