"""Threads that torch computes with: one between another runtime's passes, and only there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Thread

import pytest
import torch

from fastvlm.functional.threads import one_thread, usual_threads

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info(),
    reason="torch computes without OpenMP here",
)


@pytest.fixture(autouse=True)
def several() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_torch_computes_in_one_thread_and_afterwards_as_before() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
        with usual_threads():
            assert torch.get_num_threads() == 3
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with usual_threads():
        assert torch.get_num_threads() == 3


def test_an_error_within_changes_nothing_afterwards() -> None:
    with pytest.raises(ValueError, match="within"), one_thread(), usual_threads():
        raise ValueError("within")
    assert torch.get_num_threads() == 3
    with usual_threads():
        assert torch.get_num_threads() == 3


def test_other_threads_are_not_concerned() -> None:
    found = []
    with one_thread():
        other = Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert found == [3]
