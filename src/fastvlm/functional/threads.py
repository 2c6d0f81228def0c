"""Threads that torch computes with, and those of another runtime beside them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

import torch

_LIBRARIES = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib"}
_outside = local()
"""`threads`: how many a thread computed with outside of `one_thread`; none outside of it."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute what this thread asks for in this thread alone.

    Between passes that another runtime computes on threads of its own, torch's must not wake: they
    spin for a while after each operator, and with more threads than cores each then waits for the
    others until the system takes turns, which lasts longer than a pass of a small model.

    Other threads are not concerned, which rules out `torch.set_num_threads`: it also sets how many
    those begin with that have computed nothing yet. Where torch has no OpenMP this does nothing.
    """
    set_threads, before = _set_threads(), torch.get_num_threads()
    if set_threads is None or before == 1:
        yield
        return
    outside, _outside.threads = getattr(_outside, "threads", None), before
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)
        _outside.threads = outside


@contextmanager
def usual_threads() -> Iterator[None]:
    """Have torch compute as outside of `one_thread`: what takes long, and is done once."""
    set_threads, outside = _set_threads(), getattr(_outside, "threads", None)
    if set_threads is None or outside is None:
        yield
        return
    set_threads(outside)
    try:
        yield
    finally:
        set_threads(1)


@cache
def _set_threads() -> Callable[[int], Any] | None:
    """Return OpenMP's own function for it, of the library that torch has loaded."""
    name = _LIBRARIES.get(sys.platform)
    if name is None:
        return None
    try:
        # Names are looked up among all that torch's library needs, OpenMP's included.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        found: Callable[[int], Any] = library.omp_set_num_threads
    except (OSError, AttributeError):
        return None
    return found
