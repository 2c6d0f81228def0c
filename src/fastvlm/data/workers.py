"""Applying a function to items, in order, ahead of time in worker processes.

The processes are those of `torch.utils.data.DataLoader`. They are spawned, as a process whose torch
has threads can't be forked safely, and compute with one thread each.
"""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvlm.functional.cores import usable_cores
from fastvlm.functional.errors import FastVlmError, InputError, StorageError, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")

GRACE_SECONDS = 60
"""Seconds that a worker goes on after it was told to end, so that a run can finish its step."""
BLOCKED_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that reach all processes of a terminal or a job; what becomes of the workers then is
decided by the process that they work for."""
END_OF_ITEMS = object()


class LostWorkerError(FastVlmError):
    """A worker process that prepares data was killed, by the system or from outside."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Failed:
    """Stands for what could not be made, until it is its turn."""

    error: FastVlmError


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    """What was made of an item."""

    result: Any


def usual_workers(processes: int = 1) -> int:
    """Return the default number of workers for each training process.

    Args:
        processes: Training processes on this machine, which share its cores.
    """
    return max(0, min(4, usable_cores() // processes - 1))


def prepared(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int = 0,
    ahead: int = 1,
) -> Generator[Result]:
    """Yield the results of a function on items, in order.

    The results, and an error raised after them, are the same for any number of workers. Workers
    start with the first result, and end with the last one or when the generator is closed. A thread
    reads the items and copies results out of shared memory, so that nothing waits for a disk, and
    little shared memory is in use at any time.

    Args:
        function: The function, which must be picklable; tensors in its results are on the CPU.
        items: The items, which must be picklable; they are read ahead if there are workers.
        workers: The number of processes. With 0, each item is read and prepared when it is needed.
        ahead: Results that are held ready, besides two for each worker.

    Raises:
        FastVlmError: Raised by the function or the items.
        LostWorkerError: A worker was killed.
        StorageError: The shared memory is full.
        InputError: The number of workers is negative, or the function can't be pickled.
    """
    if workers < 0:
        raise InputError(f"There are 0 workers or more; got {workers}.")
    if not workers:
        yield from map(function, items)
        return
    if multiprocessing.current_process().daemon:
        raise InputError("A process of multiprocessing's that is a daemon can have no workers.")
    try:
        packed = pickle.dumps(function)
    except Exception as error:  # (of whatever it consists of)
        raise _unsent(error) from error
    ready: queue.Queue[Any] = queue.Queue(max(1, ahead))
    stopped = threading.Event()
    loader: DataLoader[Any] = DataLoader(
        _Calls(packed),
        batch_size=None,
        # Whatever can be iterated; the items stand for the numbers that samplers draw.
        sampler=_packed(function, items),
        num_workers=workers,
        collate_fn=_unchanged,
        multiprocessing_context="spawn",
        worker_init_fn=_begin,
        # Or the run's own draws would depend on when workers start.
        generator=torch.Generator(),
    )
    # Whoever forgets these results must not be kept alive by their thread.
    thread = threading.Thread(
        target=_pull, args=(loader, ready, stopped), name="fastvlm data", daemon=True
    )

    def stop() -> None:
        stopped.set()
        thread.join()

    # Workers are gone before Python ends those that are left, and waits for them.
    atexit.register(stop)
    thread.start()
    try:
        while (found := ready.get()) is not END_OF_ITEMS:
            if isinstance(found, _Made):
                yield found.result
            else:
                raise found.error if isinstance(found, _Failed) else found
    finally:
        stop()
        atexit.unregister(stop)


def _packed(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[bytes | _Failed | _Made]:
    """Yield items as bytes, and in the place of the first that can't be read, why.

    The queue to a worker would lose an item that can't be pickled, such as an image that is closed.
    It is prepared in this process.
    """
    try:
        for item in items:
            try:
                packed = pickle.dumps(item)
            except Exception:  # noqa: BLE001 (of whatever the item consists of)
                yield _called(function, item)
            else:
                yield packed
    except FastVlmError as error:
        yield _Failed(error)


def _called(function: Callable[[Item], Result], item: Item) -> _Failed | _Made:
    try:
        return _Made(function(item))
    except FastVlmError as error:
        return _Failed(error)


class _Calls(Dataset[Any]):
    """Calls a function, as data sets are asked for an item.

    Args:
        packed: The function, as bytes, so that it is read where an error can be told.
    """

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.function: Callable[[Any], Any] | None = None

    def __getitem__(self, item: bytes | _Failed | _Made) -> _Failed | _Made:
        if isinstance(item, bytes):
            if self.function is None:
                try:
                    self.function = pickle.loads(self.packed)
                except Exception as error:  # noqa: BLE001 (of whatever it consists of)
                    return _Failed(_unsent(error))
            item = _called(self.function, pickle.loads(item))
        try:
            # Here, and not where the queue's own thread pickles: an error there would be lost, and
            # what was made would be waited for in vain.
            shared: _Failed | _Made = with_tensors(item, Tensor.share_memory_)
        except (OSError, RuntimeError) as error:
            return _Failed(
                StorageError(
                    "There is no room in shared memory for what a worker prepared"
                    f" ({first_line(error)}); give it more, or take no workers."
                )
            )
        return shared


def _unsent(error: Exception) -> InputError:
    return InputError(
        f"What prepares the data can't be sent to a worker ({first_line(error)}); take none."
    )


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to all tensors in nested lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: with_tensors(one, change) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_tensors(one, change) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **with_tensors(found, change))
    return value


def _unchanged(made: Any) -> Any:
    return made


def _pull(loader: DataLoader[Any], ready: queue.Queue[Any], stopped: threading.Event) -> None:
    """Take what workers made out of shared memory, until all is there or nobody wants more."""
    if hasattr(signal, "pthread_sigmask"):
        # Started here, the tracker would open this thread to signals again.
        resource_tracker.ensure_running()
        # Workers inherit it, so that Ctrl-C doesn't hit them while they start, either.
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    made: Iterator[Any] | None = None
    try:
        made = iter(loader)
        while not stopped.is_set():
            result = next(made, END_OF_ITEMS)
            if not _put(ready, with_tensors(result, Tensor.clone), stopped):
                break
            if result is END_OF_ITEMS:
                break
    except Exception as error:  # noqa: BLE001 (raised where the results are asked for)
        _put(ready, _explained(error), stopped)
    finally:
        # Ends its workers, and waits for them.
        made = None


def _put(ready: queue.Queue[Any], result: Any, stopped: threading.Event) -> bool:
    """Hand over a result; return whether it is still wanted."""
    while not stopped.is_set():
        try:
            ready.put(result, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _explained(error: Exception) -> Exception:
    """Return what is said of a worker that has ended."""
    # What is raised in a worker comes as "Caught ... in DataLoader worker process".
    died = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    if died or (isinstance(error, OSError | EOFError) and not str(error).startswith("Caught ")):
        return LostWorkerError(
            "A process that prepared data has ended, perhaps for want of memory"
            f" ({first_line(error)}); go on with fewer workers, or with none."
        )
    return error


def _begin(_: int) -> None:
    """Let a worker end with the process that it works for, and not before it."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, name="parent", daemon=True).start()
    if hasattr(signal, "pthread_sigmask"):
        # A scheduler tells all processes of a job to end; the run then finishes its step first.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
