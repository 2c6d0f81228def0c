"""Workers that prepare data: what comes of them is what comes without them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvlm.data.workers import LostWorkerError, prepared, usual_workers
from fastvlm.functional.errors import FastVlmError, InputError, StorageError
from tests.data import making


def outcome(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> list[Any]:
    """Return what is yielded, and the error in the end."""
    found: list[Any] = []
    try:
        found += prepared(function, items, workers=workers, ahead=4)
    except FastVlmError as error:
        found.append((type(error), str(error)))
    return found


def plain(made: making.Made) -> tuple[Any, ...]:
    [x], held = made.tensors
    return made.number, x.tolist(), {name: y.tolist() for name, y in held.items()}


def test_results_and_errors_come_in_order_from_any_number_of_workers() -> None:
    # The worker fails at 11, long after the last item of the others was read.
    *made, error = outcome(making.make, range(1000), 2)
    *alone, expected = outcome(making.make, range(1000), 0)
    assert len(made) == 11
    assert list(map(plain, made)) == list(map(plain, alone))
    assert error == expected
    assert {one.process for one in alone} == {os.getpid()}
    assert os.getpid() not in {one.process for one in made}
    assert {one.threads for one in made} == {1}
    # They are this process's own: shared memory is small in many containers.
    assert not any(x.is_shared() for one in made for x in one.tensors[0])


def test_items_that_can_not_be_read_or_sent_fail_in_their_turn() -> None:
    for items in (making.numbers, lambda last: [*range(last), making.Unsendable(), 5]):
        *made, error = outcome(making.make, items(9), 1)
        *alone, expected = outcome(making.make, items(9), 0)
        assert list(map(plain, made)) == list(map(plain, alone))
        assert len(made) == 9
        assert error == expected


def test_no_draw_of_the_run_is_taken_and_closing_ends_the_workers() -> None:
    torch.manual_seed(5)
    with closing(prepared(making.process_of, range(10**6), workers=1)) as found:
        [worker] = islice(found, 1)
    assert torch.rand(3).equal(torch.manual_seed(5) and torch.rand(3))
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_what_can_not_be_done_by_workers_is_refused() -> None:
    with pytest.raises(InputError):
        next(prepared(making.make, [1], workers=-1))
    with pytest.raises(InputError):
        next(prepared(lambda item: item, [1], workers=1))


def test_the_usual_number_leaves_a_core_to_the_training() -> None:
    cores = len(os.sched_getaffinity(0))
    assert usual_workers() == min(4, cores - 1)
    assert usual_workers(cores) == 0


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_in_a_sentence() -> None:
    found = outcome(making.make_and_die, range(100), 1)
    assert found[:-1] == [0, 1, 2][: len(found) - 1]
    assert found[-1][0] is LostWorkerError


@pytest.mark.slow
def test_full_shared_memory_is_told_in_a_sentence() -> None:
    [(kind, _)] = outcome(making.make_without_memory, range(3), 1)
    assert kind is StorageError


def ended(process: int) -> bool:
    """Say whether a process is gone, or is waited for by nobody."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_outlast_ctrl_c_and_end_with_a_process_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.data.making"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        workers = [int(run.stdout.readline()) for _ in range(2)]
        for worker in workers:
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                os.kill(worker, number)
        time.sleep(0.5)
        assert not any(map(ended, workers))
        run.kill()
        run.wait()
        until = time.monotonic() + 10
        while not all(map(ended, workers)):
            assert time.monotonic() < until
            time.sleep(0.05)
