"""What workers make in tests; it imports little, as they start with it."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlm.data.workers import prepared
from fastvlm.functional.errors import InputError


@dataclass(frozen=True, slots=True)
class Made:
    """What is made of a number."""

    number: int
    tensors: tuple[list[Tensor], dict[str, Tensor]]
    process: int
    threads: int


class Unsendable:
    """An item that can't be pickled."""

    def __reduce__(self) -> str:
        raise OSError("closed")


def make(item: int | Unsendable) -> Made:
    """Make two tensors of a number."""
    if isinstance(item, Unsendable):
        raise InputError("It can't be sent.")
    if item == 11:
        raise InputError("Eleven can't be made.")
    x = torch.arange(6.0).sqrt() * item
    return Made(item, ([x], {"y": x.exp()}), os.getpid(), torch.get_num_threads())


def numbers(last: int) -> Iterator[int]:
    """Yield numbers, and fail after the last."""
    yield from range(last)
    raise InputError("No more can be read.")


def make_and_die(item: int) -> int:
    """End the worker at a number, as a system does that is out of memory."""
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def make_without_memory(item: int) -> Tensor:
    """Make what is larger than any shared memory that there is."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return torch.zeros(1 << 20) + item


def process_of(_: int) -> int:
    """Return the worker's process, slowly."""
    time.sleep(0.05)
    return os.getpid()


def main() -> None:
    """Say which processes work, and go on until killed."""
    found = set()
    for process in prepared(process_of, iter(int, 1), workers=2):
        if process not in found:
            found.add(process)
            sys.stdout.write(f"{process}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
