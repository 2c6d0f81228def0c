"""One Ray on this machine for all tests of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from fastvlm.cluster.connection import connected

    with connected(None, 3) as found:
        yield found
