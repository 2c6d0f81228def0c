"""The engines, and the processes that their models are loaded into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.environments import ENVIRONMENTS, is_complete, python_of
from peers.workers.worker_protocol import ORDINARY, Order

WORKERS = Path(__file__).parent / "workers"
LOOKUP, DRAFT, CASCADE, COMPILED = "prompt lookup", "draft", "cascade", "compiled"
OURS = (ORDINARY, LOOKUP, DRAFT, CASCADE)
LAST_WORDS = 300
"""Letters of a worker's log that are quoted where it ends without a word."""


@dataclass(frozen=True)
class Engine:
    """An engine that is measured.

    Args:
        title: Its name in the report.
        worker: Its worker's file.
        ways: Its ways of decoding.
        shares: Whether one worker decodes in all ways; else each has its own.
    """

    title: str
    worker: str
    ways: Sequence[str]
    shares: bool = False


ENGINES = {
    "fastvlm": Engine("fastvlm", "fastvlm_worker.py", OURS, shares=True),
    "fastvlm-onnx": Engine("fastvlm, ONNX Runtime", "fastvlm_onnx_worker.py", OURS, shares=True),
    "transformers": Engine(
        "transformers", "transformers_worker.py", (ORDINARY, LOOKUP, COMPILED), shares=True
    ),
    "vllm": Engine("vLLM", "vllm_worker.py", (ORDINARY, LOOKUP)),
    "openvino": Engine("OpenVINO GenAI", "openvino_worker.py", (ORDINARY, LOOKUP)),
    "llama.cpp": Engine("llama.cpp", "llama_worker.py", (ORDINARY, LOOKUP)),
}
"""The engines by the names of their environments; fastvlm runs in this process's own."""


@dataclass(frozen=True)
class Contender:
    """A worker that takes part: an engine's, with the ways that it decodes in."""

    engine: str
    ways: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its name among files."""
        return "-".join((self.engine, *self.ways)).replace(" ", "-")


class WorkerError(Exception):
    """What an engine says that it can't do."""


class Worker:
    """A process that holds a model.

    Args:
        command: What runs it, without its order.
        order: What it loads.
        log: The file that takes what it prints.
        timeout: The longest that it may take to load or to answer, in seconds.

    Raises:
        WorkerError: It can't load the model.
    """

    def __init__(self, command: Sequence[str], order: Order, log: Path, timeout: float) -> None:
        self.log, self.timeout = log, timeout
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, order.line()],
                env=os.environ | {"OMP_NUM_THREADS": str(order.threads), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        try:
            self.ready = self._answer()
        except WorkerError:
            self.close()
            raise

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            WorkerError: It can't do that, it has ended, or it took too long.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._end()) from None
        return self._answer()

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended by itself, or took too long."""
        return self.process.poll() is not None

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(self.timeout, give_up)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            # Its output ends a moment before the process does.
            ended = self._end()
            raise WorkerError(f"no answer within {self.timeout:.0f} s" if late.is_set() else ended)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _end(self) -> str:
        code = self.process.wait()
        return f"ended with {code}: {' '.join(self.log.read_text().split())[-LAST_WORDS:]}"


class Pool:
    """Workers that are loaded when they are first asked, at most so many at a time.

    Args:
        start: Loads a contender's worker.
        most: The most that are loaded at a time; the one that was asked longest ago ends first.
    """

    def __init__(self, start: Callable[[Contender], Worker], most: int) -> None:
        self.start, self.most = start, most
        self.workers: OrderedDict[Contender, Worker] = OrderedDict()

    def __enter__(self) -> Pool:
        """Return the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all workers."""
        while self.workers:
            self.workers.popitem()[1].close()

    def get(self, contender: Contender) -> Worker:
        """Return a contender's worker.

        Raises:
            WorkerError: It can't load the model.
        """
        if contender not in self.workers or self.workers[contender].has_ended:
            self._end(contender)
            while len(self.workers) >= self.most:
                self.workers.popitem(last=False)[1].close()
            self.workers[contender] = self.start(contender)
        self.workers.move_to_end(contender)
        return self.workers[contender]

    def _end(self, contender: Contender) -> None:
        if contender in self.workers:
            self.workers.pop(contender).close()


def contenders_of(engines: Sequence[str], *, draft: bool) -> list[Contender]:
    """Return the workers that some engines need.

    Args:
        engines: Their names.
        draft: Whether there is a draft.
    """
    found = []
    for name in engines:
        engine = ENGINES[name]
        ways = [way for way in engine.ways if draft or way not in (DRAFT, CASCADE)]
        parts = [ways] if engine.shares else [[way] for way in ways]
        found += [Contender(name, tuple(part)) for part in parts]
    return found


def command_of(engine: str, folder: Path) -> list[str]:
    """Return what runs an engine's worker.

    Args:
        engine: Its name.
        folder: Where the environments are.

    Raises:
        WorkerError: Its environment is not complete.
    """
    script = str(WORKERS / ENGINES[engine].worker)
    if engine not in ENVIRONMENTS:
        return [sys.executable, script]
    if not is_complete(folder, engine):
        file = folder / "environments" / f"{engine}.error"
        why = f": {file.read_text()}" if file.is_file() else ""
        raise WorkerError(f"its environment is not set up{why}")
    return [str(python_of(folder, engine)), script]
