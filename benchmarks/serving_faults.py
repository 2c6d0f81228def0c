"""Hostile requests to a server, while others are answered: what they get, and what it costs these.

`fastvlm serve` runs in a process of its own. Clients send broken images, decompression bombs,
malformed JSON, wrong keys, half of a body and more (`hostile_requests.py`), or vanish while they
are answered. Meanwhile one client asks the same question again and again: its streamed reply must
stay the same. After each quarter of the requests the server's memory, threads and open files are
held against those before. With `--schemathesis PROGRAM` requests made from the server's OpenAPI
document follow.

Run `python benchmarks/serving_faults.py [--requests N] [--schemathesis PROGRAM] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from fastvlm.evaluation.measuring import hardware
from fastvlm_example import HELD_OUT_SCENES, SCENE_PROMPT
from fastvlm_example.scenes import render, sample
from hostile_requests import KINDS, Attacker, attack, data_url

KEY = "key-of-the-server"
CLIENTS = 6
ROUNDS = 4
LEAK = re.compile(r"Traceback|File \"|site-packages|\.py[:\"]|root:x:")
"""What no client is to read: the server's code, or the machine's files."""
PROMISED = {"503"}
"""Statuses from 500 on that a busy server may answer with."""
SERVER = "from fastvlm.cli import main; main()"


def scene_image() -> bytes:
    """Return a scene as a PNG."""
    content = io.BytesIO()
    render(sample(HELD_OUT_SCENES), 256).save(content, "PNG")
    return content.getvalue()


@contextmanager
def server(log: Path) -> Iterator[tuple[int, str]]:
    """Run a server; its process and its address."""
    with log.open("w") as lines:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, "serve", "--port", "0", "--log-json", "--threads", "1",
             "--body-seconds", "5"],
            stdout=subprocess.PIPE, stderr=lines, text=True,
            env={**os.environ, "FASTVLM_API_KEY": KEY},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise RuntimeError(f"The server didn't start; see {log}.")
            yield process.pid, found[0].rstrip("/")
        finally:
            process.terminate()
            process.wait(60)


class Steady:
    """A client that asks the same question again and again, and reads each reply as it streams.

    Args:
        address: The server's address.
        key: A key of the server.
        image: The image that it asks about.
    """

    def __init__(self, address: str, key: str, image: bytes) -> None:
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(image)}},
            {"type": "text", "text": SCENE_PROMPT},
        ]
        self.body = {
            "messages": [{"role": "user", "content": parts}],
            "stream": True,
            "temperature": 0,
            "max_tokens": 48,
        }
        self.client = httpx.Client(
            base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=120
        )
        self.replies: Counter[str] = Counter()
        self.busy = 0
        self._ended = threading.Event()

    def ask(self) -> str | None:
        """Return the reply, with its end; None where the server is busy, as it may be."""
        with self.client.stream("POST", "/v1/chat/completions", json=self.body) as found:
            if str(found.status_code) in PROMISED:
                return None
            return "".join(re.sub(r'"(id|created)": ?("[^"]*"|\d+),?', "", line) + "\n"
                           for line in found.iter_lines())  # fmt: skip

    def _run(self) -> None:
        while not self._ended.is_set():
            reply = self.ask()
            if reply is None:
                self.busy += 1
                time.sleep(0.1)
            else:
                self.replies[text_of(reply)] += 1

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask until the end, and until the reply at hand has ended."""
        self._ended.clear()
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(self._run)
            try:
                yield
            finally:
                self._ended.set()
        run.result()


def text_of(reply: str) -> str:
    """Return a streamed reply's text, then its end or its error."""
    text = ""
    for line in reply.splitlines():
        data = line.removeprefix("data: ")
        if data == "[DONE]" or '"error"' in data:
            text += f"\n{data}"
        elif line.startswith("data: "):
            for choice in json.loads(data)["choices"]:
                text += choice["delta"].get("content") or ""
    return text


def held(process: int) -> dict[str, int]:
    """Return what a process holds: its memory in bytes, its threads and its open files."""
    status = Path(f"/proc/{process}/status").read_text()
    numbers = dict(re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE))
    return {
        "rss_bytes": int(numbers["VmRSS"]) * 1024,
        "threads": int(numbers["Threads"]),
        "files": len(list(Path(f"/proc/{process}/fd").iterdir())),
    }


def settled(process: int, address: str) -> dict[str, int]:
    """Return what a process holds once it has nothing to do."""
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(100):
        text = httpx.get(f"{address}/metrics", headers=headers).text
        busy = re.findall(r"^vllm:num_requests_(?:running|waiting)\S* (\S+)$", text, re.MULTILINE)
        if not any(map(float, busy)):
            break
        time.sleep(0.2)
    else:
        raise RuntimeError("Requests are still in progress.")
    time.sleep(7)
    return held(process)


def attacks(address: str, key: str, image: bytes, number: int, seed: int) -> list[dict[str, Any]]:
    """Send hostile requests by several clients at once; return what came of each."""

    def run(client: int) -> list[dict[str, Any]]:
        at = Attacker(address, key, random.Random(f"{seed}-{client}"), image)
        try:
            return [attack(at, one) for one in range(client, number, CLIENTS)]
        finally:
            at.close()

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [one for found in pool.map(run, range(CLIENTS)) for one in found]


def faults(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers that no client should have got: a failure, or the server's insides."""
    return [
        {**one, "text": one["text"][:500]}
        for one in found
        if (one["status"].startswith("5") and one["status"] not in PROMISED)
        or (one["status"].isdigit() and LEAK.search(one["text"]))
        or (one["status"][:1] == "4" and one["kind"] != "no_http" and not is_openais(one))
        or one["status"] in ("ReadTimeout", "RemoteProtocolError", "ReadError")
    ]


def is_openais(one: dict[str, Any]) -> bool:
    """Return whether an answer is an error in OpenAI's shape, or one without a body."""
    try:
        error = json.loads(one["text"] or '{"error": {"message": "a", "type": "b"}}')["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return bool(error["message"] and error["type"])


def by_kind(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many requests of each kind got which status."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in found:
        counts[one["kind"]][one["status"]] += 1
    return {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)}


def slowest(found: list[dict[str, Any]]) -> dict[str, float]:
    """Return how long the slowest answer of each kind took, in seconds."""
    return {
        kind.__name__: round(
            max((one["seconds"] for one in found if one["kind"] == kind.__name__), default=0), 2
        )
        for kind in KINDS
    }


def logged(log: Path) -> dict[str, Any]:
    """Return how many requests the server's log has, by status, and what failed in it."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    return {
        "requests": len(requests),
        "by_status": dict(sorted(Counter(str(one["status"]) for one in requests).items())),
        "errors": dict(Counter(failure(one) for one in lines if one["level"] == "error")),
    }


def failure(line: dict[str, Any]) -> str:
    """Return what an error of the log is, and where it was raised."""
    place = Path(line["traceback"][-1]).name if "traceback" in line else ""
    return f"{line.get('error', line['event'])} {place}".strip()


def from_document(program: str, address: str, examples: int) -> dict[str, Any]:
    """Let schemathesis send what it makes of the server's OpenAPI document."""
    found = subprocess.run(
        [program, "run", f"{address}/openapi.json", "-H", f"Authorization: Bearer {KEY}",
         "--checks", "not_a_server_error", "--max-examples", str(examples), "--mode", "all",
         "--workers", "2", "--seed", "1", "--request-timeout", "60", "--no-color"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {"exit_code": found.returncode, "summary": found.stdout.splitlines()[-40:]}


def main() -> None:
    """Attack a server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--schemathesis", metavar="PROGRAM")
    parser.add_argument("--examples", type=int, default=300, help="of each endpoint")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    image, out = scene_image(), {"hardware": hardware(), "settings": settings_of(options)}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with server(log) as (process, address):
            steady = Steady(address, KEY, image)
            expected = text_of(steady.ask() or "")
            # As many as warm up every path once.
            attacks(address, KEY, image, min(options.requests, 600), options.seed + 1)
            kept, found, seconds = [settled(process, address)], [], 0.0
            for part in range(ROUNDS):
                number = options.requests // ROUNDS
                started = time.monotonic()
                with steady.asking():
                    found += attacks(address, KEY, image, number, options.seed + 10 * part)
                seconds += time.monotonic() - started
                kept.append(settled(process, address))
            if options.schemathesis is not None:
                with steady.asking():
                    out["schemathesis"] = from_document(
                        options.schemathesis, address, options.examples
                    )
                kept.append(settled(process, address))
            same = text_of(steady.ask() or "") == expected
        out |= {
            "requests": len(found),
            "seconds": round(seconds, 1),
            "slowest_seconds": slowest(found),
            "by_kind": by_kind(found),
            "faults": faults(found),
            "steady": {
                "replies": sum(steady.replies.values()),
                "same": steady.replies[expected],
                "busy": steady.busy,
                "same_afterwards": same,
            },
            "held": kept,
            "log": logged(log),
        }
    print(json.dumps(out, indent=1))  # noqa: T201
    if options.json is not None:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a run depends on."""
    kinds = {kind.__name__: share for kind, share in KINDS.items()}
    return {"requests": options.requests, "seed": options.seed, "clients": CLIENTS, "kinds": kinds}


if __name__ == "__main__":
    main()
