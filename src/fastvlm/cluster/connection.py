"""Ray, where it is installed: on this machine alone, or on a cluster."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from fastvlm.functional.errors import InputError, first_line

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Settings of Ray's, unless the environment has others: it doesn't report to its makers, doesn't
write of what it mends by itself, lets workers have the priority of any other process, and has
patience on a machine that is busy loading a model."""
LOCAL = "local"
"""The address of this machine alone."""
CONNECTION_SECONDS = 10
OBJECT_STORE_BYTES = 128 * 2**20
"""Shared memory of Ray on this machine: names and prompts go through it, and no images."""


def needed_ray(part: str = "ray") -> Any:
    """Import and return Ray, or a part of it.

    Args:
        part: The module.

    Raises:
        InputError: It is not installed.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        return import_module(part)
    except ImportError as error:
        raise InputError(
            f"This needs Ray ({error.name} is missing): pip install 'fastvlm[ray]'."
        ) from error


def is_local(address: str | None) -> bool:
    """Return whether an address is that of this machine alone."""
    return address in (None, LOCAL)


def check_reachable(address: str) -> None:
    """Refuse an address at which nothing listens, for which Ray itself would wait for minutes.

    Raises:
        InputError: Nothing does.
    """
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]]+?)\]?:(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), CONNECTION_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"There is no Ray cluster at {address}: {first_line(error)}.") from error


@contextmanager
def connected(address: str | None, cores: int | None = None) -> Iterator[Any]:
    """Yield Ray, connected to a cluster; where there was no connection before, it ends after.

    Args:
        address: The cluster's address; None or `local` for this machine alone, on which Ray is
            started.
        cores: Tasks of one core that may run at a time on this machine; None for its cores.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    ray = needed_ray()
    if address is not None:
        check_reachable(address)
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": address}
    if is_local(address):
        options = {
            "address": LOCAL,
            "num_cpus": cores,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # (Ray raises that itself, where a machine is too busy to start it)
        where = "be started here" if is_local(address) else f"be reached at {address}"
        raise InputError(f"Ray can't {where}: {first_line(error)}.") from error
    try:
        yield ray
    finally:
        ray.shutdown()
