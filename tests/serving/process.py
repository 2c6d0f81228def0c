"""A server in a process of its own, as people start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

PATIENCE = 120.0
"""The longest that a server may take to load, in seconds, on a machine that is busy."""


@contextmanager
def serve_process(*options: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[Any]]]:
    """Run `fastvlm serve` on a free port; its address and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = "from fastvlm.cli import main; main()"
    command = [sys.executable, "-c", run, "serve", "--port", str(port), *options]
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("The server did not start.")
            time.sleep(0.05)
        yield address, process
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    """Return whether a server is ready."""
    try:
        return httpx.get(f"{address}/ready").is_success
    except httpx.TransportError:
        return False
