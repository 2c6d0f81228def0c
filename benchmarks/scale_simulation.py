"""Simulate fleets of 1 to 1,000 replicas: queueing, caches, a loss of a tenth, autoscaling.

What a replica does is measured: the requests per second at each number of requests that are decoded
together, and what a kept image saves, are those of `results/serving_load.json` (the example model
on one core). Replicas share their rate among the requests in their slots; others wait in line, and
beyond a second batch that waits the next replica is asked, as in `fastvlm.cluster`. Requests come
at random (Poisson) times, in the course of time several about each image.

Run `python benchmarks/scale_simulation.py [--replicas 1,10,100,1000] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm.functional.files import as_json

RESULTS = Path(__file__).parent / "results"
SLOTS = 16
KEPT_IMAGES = 100
"""Images whose states a replica keeps: 256 MiB of them, of the example model."""
IMAGES_AT_A_TIME = 20
"""Images per replica that are asked about in the same minutes."""
QUESTIONS = 5
"""Questions about each of them."""
LOAD = 0.8
"""The rate of requests as a share of what all replicas could do with new images."""
START_SECONDS = 30.0
"""How long a new replica takes until it answers: a process, Ray, and a model to load."""
DECISION_SECONDS, PATIENCE_SECONDS = 10.0, 30.0
"""How often Ray Serve looks at the load, and how long it must last before replicas are added."""
PREFERRED = 6
"""Replicas in the order of an image's preference that are looked at before any with room."""


@dataclass(frozen=True)
class Measured:
    """What a replica does.

    Args:
        rates: Requests per second by the number decoded together.
        kept: The work of a request whose image is kept, as a share of another's.
    """

    rates: tuple[float, ...]
    kept: float

    @classmethod
    def read(cls) -> Measured:
        """Return what was measured."""
        found = json.loads((RESULTS / "serving_load.json").read_text())
        known = {
            int(n): row["on"]["requests_per_second"] for n, row in found["closed_loop"].items()
        }
        rates = [0.0]
        for number in range(1, SLOTS + 1):
            low = max(one for one in known if one <= number)
            high = min(one for one in known if one >= number)
            part = 0.0 if low == high else (number - low) / (high - low)
            rates.append(known[low] + part * (known[high] - known[low]))
        new, one = (
            found["kept"][name]["requests_per_second"] for name in ("new images", "one image")
        )
        return cls(tuple(rates), new / one)


@dataclass(slots=True)
class Asked:
    """A request: its image, when it came, and how often it had to be asked again."""

    image: int
    came: float
    retried: bool = False


@dataclass(slots=True)
class Replica:
    """A replica's slots and line; work is counted in requests with new images."""

    number: int
    kept: OrderedDict[int, None] = field(default_factory=OrderedDict)
    slots: list[tuple[float, int, Asked]] = field(default_factory=list)
    line: deque[Asked] = field(default_factory=deque)
    done: float = 0.0
    """Work that a request has got that has been in a slot from the beginning."""
    at: float = 0.0
    version: int = 0

    @property
    def load(self) -> int:
        """Requests in slots and in line."""
        return len(self.slots) + len(self.line)


class Fleet:
    """Replicas under load.

    Args:
        measured: What one does.
        replicas: Their number at the beginning.
        most: The most that there will be.
        affinity: Whether requests prefer a replica by their image.
        seed: Of all draws.
    """

    def __init__(
        self, measured: Measured, replicas: int, most: int, *, affinity: bool = True, seed: int = 0
    ) -> None:
        self.measured, self.affinity, self.most = measured, affinity, most
        self.draws = random.Random(seed)
        self.live: dict[int, Replica] = {}
        self.numbers: list[int] = []
        self.events: list[tuple[float, int, str, Any]] = []
        self.count = self.hits = self.starts = self.starting = self.retried = self.sent = 0
        self.seen: set[int] = set()
        self.again = 0
        """Requests about an image that was asked about before."""
        self.waits: list[tuple[float, float]] = []
        """When each request came, and how long it took in all."""
        self.homeless: list[Asked] = []
        self.images: list[tuple[int, int]] = []
        self.fresh = 0
        for _ in range(replicas):
            self._add(0.0)

    def run(
        self,
        seconds: float,
        rates: Sequence[tuple[float, float]],
        *,
        lose: tuple[float, float] | None = None,
        scale: bool = False,
    ) -> None:
        """Simulate.

        Args:
            seconds: How long requests come.
            rates: From when on they come at which rate, per second.
            lose: When which share of the replicas is lost, to be started again.
            scale: Whether their number follows the load.
        """
        self._at(0.0, "arrive", list(rates))
        if lose is not None:
            self._at(lose[0], "lose", lose[1])
        if scale:
            self._at(DECISION_SECONDS, "decide", 0.0)
        self.until = seconds
        while self.events:
            now, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"_{kind}")(now, what)

    def _at(self, when: float, kind: str, what: Any) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, kind, what))

    def _arrive(self, now: float, rates: list[tuple[float, float]]) -> None:
        if now > self.until:
            return
        while len(rates) > 1 and rates[1][0] <= now:
            rates.pop(0)
        image = self._image()
        self.sent += 1
        self.again += image in self.seen
        self.seen.add(image)
        self._send(now, Asked(image, now))
        self._at(now + self.draws.expovariate(rates[0][1]), "arrive", rates)

    def _image(self) -> int:
        """Return the image of the next request; a new one for one that was asked about enough."""
        while len(self.images) < IMAGES_AT_A_TIME * max(len(self.numbers), 1):
            self.images.append((self.fresh, self.draws.randint(1, 2 * QUESTIONS - 1)))
            self.fresh += 1
        place = self.draws.randrange(len(self.images))
        image, left = self.images[place]
        self.images[place] = (image, left - 1)
        if left == 1:
            self.images[place] = (self.fresh, self.draws.randint(1, 2 * QUESTIONS - 1))
            self.fresh += 1
        return image

    def _send(self, now: float, asked: Asked) -> None:
        if not self.numbers:
            self.homeless.append(asked)
            return
        replica = self._choose(asked.image)
        self._advance(replica, now)
        replica.line.append(asked)
        self._fill(replica)
        self._next(replica)

    def _choose(self, image: int) -> Replica:
        if self.affinity:
            # Weights that are drawn once for a pair: a replica that isn't there is passed over.
            order = random.Random(image)
            tried = 0
            for _ in range(64 * PREFERRED):
                replica = self.live.get(order.randrange(self.most))
                if replica is not None:
                    if replica.load < 2 * SLOTS:
                        return replica
                    tried += 1
                    if tried == PREFERRED:
                        break
        first, second = (self.live[self.draws.choice(self.numbers)] for _ in range(2))
        return first if first.load <= second.load else second

    def _advance(self, replica: Replica, now: float) -> None:
        number = len(replica.slots)
        if number:
            replica.done += (now - replica.at) * self.measured.rates[number] / number
        replica.at = now

    def _fill(self, replica: Replica) -> None:
        while replica.line and len(replica.slots) < SLOTS:
            asked = replica.line.popleft()
            work = 1.0
            if asked.image in replica.kept:
                self.hits += 1
                work = self.measured.kept
            replica.kept[asked.image] = None
            replica.kept.move_to_end(asked.image)
            if len(replica.kept) > KEPT_IMAGES:
                replica.kept.popitem(last=False)
            self.starts += 1
            # Replies differ in length: gamma distributed, half as wide as their mean.
            work *= self.draws.gammavariate(4, 0.25)
            heapq.heappush(replica.slots, (replica.done + work, self.starts, asked))

    def _next(self, replica: Replica) -> None:
        replica.version += 1
        if replica.slots:
            number = len(replica.slots)
            left = max(replica.slots[0][0] - replica.done, 0.0)
            when = replica.at + left * number / self.measured.rates[number]
            self._at(when, "finish", (replica.number, replica.version))

    def _finish(self, now: float, which: tuple[int, int]) -> None:
        replica = self.live.get(which[0])
        if replica is None or replica.version != which[1]:
            return
        self._advance(replica, now)
        _, _, asked = heapq.heappop(replica.slots)
        self.waits.append((asked.came, now - asked.came))
        self._fill(replica)
        self._next(replica)

    def _add(self, now: float) -> None:
        free = [number for number in range(self.most) if number not in self.live]
        number = self.draws.choice(free)
        self.live[number] = Replica(number, at=now)
        self.numbers = list(self.live)
        homeless, self.homeless = self.homeless, []
        for asked in homeless:
            self._send(now, asked)

    def _start(self, now: float, _: None) -> None:
        self.starting -= 1
        if len(self.live) < self.most:
            self._add(now)

    def _begin(self, now: float) -> None:
        self.starting += 1
        self._at(now + START_SECONDS, "start", None)

    def _lose(self, now: float, share: float) -> None:
        lost = self.draws.sample(self.numbers, max(1, round(share * len(self.numbers))))
        for number in lost:
            replica = self.live.pop(number)
            self.numbers = list(self.live)
            for asked in [*(one for _, _, one in replica.slots), *replica.line]:
                self.retried += 1
                self._send(now, Asked(asked.image, asked.came, retried=True))
            self._begin(now)

    def _decide(self, now: float, above: float) -> None:
        load = sum(replica.load for replica in self.live.values())
        wanted = min(self.most, math.ceil(load / SLOTS))
        have = len(self.live) + self.starting
        above = above + DECISION_SECONDS if wanted > have else 0.0
        if above > PATIENCE_SECONDS:
            for _ in range(wanted - have):
                self._begin(now)
            above = 0.0
        if now < self.until:
            self._at(now + DECISION_SECONDS, "decide", above)

    def latency(self, begin: float, end: float) -> dict[str, float]:
        """Return quantiles of what requests took that came in a span, in seconds."""
        took = sorted(took for came, took in self.waits if begin <= came < end)
        return {
            f"p{share}": round(took[min(int(len(took) * share / 100), len(took) - 1)], 3)
            for share in (50, 95, 99)
        }


def recovered(fleet: Fleet, lost: float, usual: float, seconds: float) -> float | None:
    """Return how long after a loss the p95 of five seconds is again near what it was."""
    at = lost
    while at + 5 <= seconds:
        if fleet.latency(at, at + 5)["p95"] <= 1.25 * usual:
            return at - lost
        at += 1
    return None


def simulate(measured: Measured, replicas: int) -> dict[str, Any]:
    """Return what a fleet of a size does."""
    rate = LOAD * replicas * measured.rates[SLOTS]
    # As many requests as tell the tails, where replicas are few.
    seconds = max(60.0, 20_000 / rate)
    found: dict[str, Any] = {"replicas": replicas, "requests_per_second": round(rate, 1)}
    for name, affinity in (("by image", True), ("at random", False)):
        fleet = Fleet(measured, replicas, replicas, affinity=affinity)
        fleet.run(seconds, [(0.0, rate)])
        found[name] = {**fleet.latency(seconds / 4, seconds), "cache_hits": round(
            fleet.hits / fleet.again, 4), "requests": fleet.sent}  # fmt: skip
    if replicas > 1:
        fleet, lost = Fleet(measured, replicas, replicas), 60.0
        fleet.run(150.0, [(0.0, rate)], lose=(lost, 0.1))
        usual = fleet.latency(20, lost)
        found["loss of a tenth"] = {
            "before": usual,
            "after": fleet.latency(lost, lost + START_SECONDS),
            "asked_again": fleet.retried,
            "requests": fleet.sent,
            "lost": fleet.sent - len(fleet.waits),
            "recovered_seconds": recovered(fleet, lost, usual["p95"], 150.0),
        }
        few = max(1, replicas // 2)
        fleet = Fleet(measured, few, replicas)
        fleet.run(240.0, [(0.0, rate * few / replicas), (60.0, rate)], scale=True)
        found["twice the load"] = {
            "replicas_before": few,
            "replicas_after": len(fleet.live),
            "during": fleet.latency(60, 180),
            "after": fleet.latency(200, 240),
        }
    return found


def main() -> None:
    """Simulate all sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", default="1,3,10,30,100,300,1000")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = Measured.read()
    found = {
        "load": LOAD,
        "slots": SLOTS,
        "start_seconds": START_SECONDS,
        "requests_per_second_of_a_replica": measured.rates[SLOTS],
        "work_with_kept_image": round(measured.kept, 3),
        "fleets": [simulate(measured, int(number)) for number in options.replicas.split(",")],
    }
    text = as_json(found)
    if options.json is None:
        print(text)  # noqa: T201
    else:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
