"""Load on a server: throughput, latency, and whether each reply is the one that it is alone.

`fastvlm serve` runs in a process of its own; the clients share one here, so that they take little
of the machine. Each request has an image, and asks for nothing that was kept of other requests
(`"cache": false`), unless a run is about that. Clients in a closed loop ask again once they are
answered; in an open loop, requests come at random (Poisson) times, whatever the server does.
Speculation on and off take turns. Every reply is compared with the one that ordinary decoding gives
to its request alone.

Run `python benchmarks/serving_load.py [--quick] [--model DIR --draft DIR] [--threads N]
[--json FILE]`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from fastvlm.evaluation.measuring import hardware, rotated
from fastvlm_example import HELD_OUT_SCENES
from fastvlm_example.scenes import render, sample
from serving_clients import Answer, Client

STRATEGIES = {"on": "cascade", "off": "autoregressive"}
"""Speculation on and off."""
CLIENTS = (1, 2, 4, 8, 16, 32)
IMAGES, QUICK_IMAGES = 32, 4
"""Different images."""
ROUNDS = 3
OPEN_LOADS = (0.4, 0.8)
"""Rates of the open loop, as shares of the requests per second of eight clients."""
OPEN_SECONDS = 20.0
TARGET_CLIENTS = 8
"""Clients whose throughput is compared with that of one client after the other."""
SERVER = "from fastvlm.cli import main; main()"


def image_urls(number: int, size: int) -> list[str]:
    """Return scenes that no model was trained on as data URLs."""
    found = []
    for seed in range(number):
        content = io.BytesIO()
        render(sample(HELD_OUT_SCENES + seed), size).save(content, "PNG")
        found.append(f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}")
    return found


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Run a server, and yield its port and the number of its process once it is ready.

    Raises:
        RuntimeError: It ended before that.
    """
    port = free_port()
    words = [sys.executable, "-c", SERVER, "serve", "--quiet", "--port", str(port)]
    for name in ("model", "draft", "threads"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name}", str(value)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        try:
            while True:
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/ready"):
                    break
                if process.poll() is not None:
                    raise RuntimeError("The server has ended.")
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99 in milliseconds; 0 where nothing was measured."""
    if len(seconds) <= 1:
        seconds = 2 * [*seconds, 0.0][:1]
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{share}": round(1000 * cuts[share - 1], 2) for share in (50, 90, 99)}


def figures(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Return what was measured of a run."""
    tokens = sum(answer.tokens for answer in answers)
    return {
        "requests": len(answers),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "requests_per_second": round(len(answers) / seconds, 2),
        "ttft_ms": percentiles(
            [answer.times[0] - answer.sent for answer in answers if answer.times]
        ),
        "itl_ms": percentiles([gap for answer in answers for gap in answer.gaps]),
        "tpot_ms": percentiles([answer.seconds_per_token for answer in answers]),
    }


class Load:
    """Puts load on a server, and keeps what is wrong with its replies.

    Args:
        client: Asks.
        images: The number of different images.
    """

    def __init__(self, client: Client, images: int) -> None:
        self.client, self.images = client, images
        self.alone: dict[int, str] = {}
        """What ordinary decoding replies about each image, alone."""
        self.compared = self.different = 0
        self.failed: list[str] = []

    async def warm_up(self) -> None:
        """Learn each reply alone, and let drafts learn what they cost."""
        answers, _ = await self.client.closed_loop(1, range(self.images), STRATEGIES["off"])
        for answer in answers:
            answer.read()
            if answer.error is not None:
                raise RuntimeError(f"A request alone failed: {answer.error}")
            self.alone[answer.image] = answer.text
        for clients in CLIENTS:
            await self.closed(clients, "on", 2 * clients)

    async def closed(
        self, clients: int, speculation: str, requests: int, *, cache: bool = False, only: int = 0
    ) -> dict[str, Any]:
        """Run a closed loop, and return its figures.

        Args:
            clients: How many there are.
            speculation: Whether it is on or off.
            requests: How many there are.
            cache: Whether what was kept of other requests may be used.
            only: Different images; 0 for all.
        """
        images = [number % (only or self.images) for number in range(requests)]
        strategy = STRATEGIES[speculation]
        return self.checked(*await self.client.closed_loop(clients, images, strategy, cache=cache))

    async def open(self, rate: float, speculation: str, seconds: float) -> dict[str, Any]:
        """Run an open loop, and return its figures."""
        return self.checked(*await self.client.open_loop(rate, seconds, STRATEGIES[speculation]))

    def checked(self, answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
        """Compare replies with those alone, and return a run's figures."""
        for answer in answers:
            answer.read()
            self.compared += 1
            if answer.error is not None:
                self.failed.append(answer.error)
            elif answer.text != self.alone[answer.image]:
                self.different += 1
        return figures([answer for answer in answers if answer.error is None], seconds)


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the run in the middle by throughput, with all throughputs beside it."""
    ordered = sorted(runs, key=lambda run: run["tokens_per_second"])
    rates = [run["tokens_per_second"] for run in runs]
    return {**ordered[len(runs) // 2], "tokens_per_second_of_rounds": rates}


async def measured(load: Load, rounds: int, seconds: float) -> dict[str, Any]:
    """Return all figures.

    Args:
        load: Puts load on the server.
        rounds: Times that each closed loop is run.
        seconds: Of each open loop.
    """
    await load.warm_up()
    runs: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for number in range(rounds):
        for clients in CLIENTS:
            for speculation in rotated([*STRATEGIES], number):
                # Enough that the first and the last ones, beside fewer others, count little.
                requests = max(load.images // 2, (6 if rounds > 1 else 2) * clients)
                run = await load.closed(clients, speculation, requests)
                runs[clients, speculation].append(run)
    found: dict[str, Any] = {"closed_loop": {}, "open_loop": {}, "kept": {}}
    for clients in CLIENTS:
        on, off = ([*runs[clients, speculation]] for speculation in STRATEGIES)
        found["closed_loop"][clients] = {
            "on": middle(on),
            "off": middle(off),
            # Of runs that followed each other.
            "throughput_on_over_off": ratio(on, off, "tokens_per_second"),
            "tpot_off_over_on": ratio(off, on, "tpot_ms", "p50"),
        }
    one, several = runs[CLIENTS[0], "on"], runs[TARGET_CLIENTS, "on"]
    found["throughput_over_one_after_the_other"] = ratio(several, one, "tokens_per_second")
    found["throughput_over_ordinary_one_after_the_other"] = ratio(
        several, runs[CLIENTS[0], "off"], "tokens_per_second"
    )
    found["throughput_over_one_after_the_other_without_drafts"] = ratio(
        runs[TARGET_CLIENTS, "off"], runs[CLIENTS[0], "off"], "tokens_per_second"
    )
    rate = statistics.median(run["requests_per_second"] for run in several)
    for share in OPEN_LOADS:
        found["open_loop"][share] = {
            "rate": round(share * rate, 2),
            **{name: await load.open(share * rate, name, seconds) for name in STRATEGIES},
        }
    for name, only in (("new images", 0), ("one image", 1)):
        found["kept"][name] = await load.closed(
            TARGET_CLIENTS, "on", load.images, cache=True, only=only
        )
    found["replies"] = {
        "compared": load.compared,
        "different": load.different,
        "failed": len(load.failed),
        "failures": sorted(set(load.failed)),
    }
    return found


def ratio(above: Sequence[Any], below: Sequence[Any], *keys: str) -> float:
    """Return the median over rounds of the ratio of two runs' figures."""

    def figure(run: Any) -> float:
        for key in keys:
            run = run[key]
        return float(run)

    return round(
        statistics.median(figure(a) / figure(b) for a, b in zip(above, below, strict=True)), 3
    )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: few requests, once")
    parser.add_argument("--model", type=Path, help="if not the example model")
    parser.add_argument("--draft", type=Path, help="if not the example model's")
    parser.add_argument("--size", type=int, default=192, help="side of the images in pixels")
    parser.add_argument("--threads", type=int, help="of the server")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    images = QUICK_IMAGES if options.quick else IMAGES
    urls = image_urls(images, options.size)
    with server(options) as (port, _):
        load = Load(Client(port, urls), images)
        rounds, seconds = (1, 2.0) if options.quick else (ROUNDS, OPEN_SECONDS)
        found = {"hardware": hardware(), **asyncio.run(measured(load, rounds, seconds))}
    report(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if found["replies"]["different"] or found["replies"]["failed"]:
        raise SystemExit("Replies were lost, or differ from what they are alone.")


def report(found: dict[str, Any]) -> None:
    """Print the figures."""
    for clients, row in found["closed_loop"].items():
        on, off = row["on"], row["off"]
        say(
            f"{clients:>2} clients: {on['tokens_per_second']:.0f} tokens/s with drafts,"
            f" {off['tokens_per_second']:.0f} without ({row['throughput_on_over_off']:.2f}x; time"
            f" per token {row['tpot_off_over_on']:.2f}x); TTFT p50 {on['ttft_ms']['p50']:.0f} and"
            f" {off['ttft_ms']['p50']:.0f} ms, ITL p99 {on['itl_ms']['p99']:.0f} and"
            f" {off['itl_ms']['p99']:.0f} ms"
        )
    say(
        f"{TARGET_CLIENTS} clients over one after the other:"
        f" {found['throughput_over_one_after_the_other']:.2f}x with drafts,"
        f" {found['throughput_over_one_after_the_other_without_drafts']:.2f}x without; with drafts"
        f" over one without {found['throughput_over_ordinary_one_after_the_other']:.2f}x"
    )
    for share, row in found["open_loop"].items():
        on, off = row["on"], row["off"]
        say(
            f"open loop, {row['rate']:.1f} requests/s ({share} of {TARGET_CLIENTS} clients'): TTFT"
            f" p50 {on['ttft_ms']['p50']:.0f} and {off['ttft_ms']['p50']:.0f} ms, p99"
            f" {on['ttft_ms']['p99']:.0f} and {off['ttft_ms']['p99']:.0f} ms"
        )
    for name, row in found["kept"].items():
        say(f"with caches, {name}: {row['tokens_per_second']:.0f} tokens/s")
    say(f"replies: {found['replies']}")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
