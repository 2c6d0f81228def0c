"""Runs in processes of their own, which can be killed; started from one that has imported torch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvlm.data.conversations import Conversation, Records, opened
from fastvlm.data.feed import Feed
from fastvlm.functional.errors import FastVlmError
from fastvlm.training.loop import train
from fastvlm.training.processes import this_process
from fastvlm.training.schedule import Schedule
from fastvlm.training.task import Losses

TURNS = (
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
)


class Parts(nn.ModuleDict):
    """A model, which has a way to call it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self["net"](x)


class Rows:
    """Fits drawn rows of unequal weight, with a dropout; a part of it learns from few rows."""

    def __init__(
        self, *, pause: float = 0.0, feeds: bool = False, rare: int = 4, workers: int = 0
    ) -> None:
        torch.manual_seed(7)
        self.module: nn.Module = Parts({
            "net": nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.3), nn.Linear(6, 2)),
            "seldom": nn.Linear(3, 2),
            "never": nn.Linear(3, 2),
        })  # fmt: skip
        self.pause, self.rare, self.workers = pause, rare, workers
        self.unit, self.whole = "tokens", None
        self.plan: dict[str, Any] = {}
        state = this_process()
        names = [f"{number}" for number in range(23)]
        records = Records(names, lambda name, _: Conversation(name, TURNS), lambda _, row: row)
        self.source = (
            Feed(records, process=state.process_index, processes=state.num_processes)
            if feeds
            else None
        )
        self.stream: Iterator[Conversation] | None = None

    def draw(self, _: int) -> list[tuple[torch.Tensor, int]]:
        time.sleep(self.pause)
        if self.source is None:
            return [(torch.randn(3), random.randrange(1, 5)) for _ in range(7)]
        self.stream = self.stream or self.source.prepared(opened, workers=self.workers, ahead=9)
        numbers = [int(conversation.name) for conversation in islice(self.stream, 3)]
        return [(torch.tensor([n / 20, n % 3, 1.0]), 1 + n % 4) for n in numbers]

    def loss(self, examples: Sequence[tuple[torch.Tensor, int]]) -> Losses:
        x = torch.stack([row for row, _ in examples])
        weights = torch.tensor([float(weight) for _, weight in examples])
        loss = ((self.module["net"](x) - x[:, :2]).square().mean(1) * weights).sum()
        rare = x[weights >= self.rare]
        if len(rare):
            loss = loss + self.module["seldom"](rare).square().sum()
        return Losses(loss, float(weights.sum()), {"rare": (float(len(rare)), len(examples))})


def work(
    output: Path, settings: dict[str, Any], task: dict[str, Any], place: dict[str, str], said: Path
) -> None:
    """Run in a child; what it says goes to a file."""
    with said.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(place)
    torch.set_num_threads(1)
    try:
        train(Rows(**task), Schedule(learning_rate=0.05, warmup=5, **settings), output)
    except FastVlmError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(3)


def free_port() -> str:
    """Return a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def place_of(rank: int, number: int, port: str) -> dict[str, str]:
    """Return what `torchrun` tells a process of a run."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    return {
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


class Children:
    """Processes of a run, killed when the test ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.training.children"])
        self.started: list[BaseProcess] = []

    def start(
        self,
        output: Path,
        number: int = 1,
        *,
        task: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> list[BaseProcess]:
        """Start a run's processes."""
        port = free_port()
        children = []
        for rank in range(number):
            place = {**place_of(rank, number, port), **(environment or {})}
            arguments = (output, settings, task or {}, place if number > 1 else {}, self.said(rank))
            children.append(self.context.Process(target=work, args=arguments, daemon=True))
            children[-1].start()
        self.started += children
        return children

    def said(self, rank: int) -> Path:
        """Return the file with what a process said."""
        return self.folder / f"said-{rank}.txt"

    def run(self, output: Path, number: int = 1, **settings: Any) -> None:
        """Run to the end."""
        for rank, child in enumerate(self.start(output, number, **settings)):
            child.join(60)
            assert child.exitcode == 0, self.said(rank).read_text()

    def end(self) -> None:
        """Leave none of them running."""
        for child in self.started:
            with contextlib.suppress(ValueError):
                child.kill()
                child.join()
