"""What every test can count on: no network, one thread, and the same seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import random
from pathlib import Path

import pytest
import torch

# Sums of floats depend on it, and the threads of a small model only wait for one another: on a
# machine that is busy with something else, two take a hundred times as long as one.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once


LONGEST = (
    "cluster/test_captions.py",
    "cluster/test_serving.py",
    "test_export.py",
    "cli/test_runs.py",
    "example/test_example.py",
    "decoding/test_sampling.py",
)
"""Files that take minutes. They come first: at the end, one process would run them alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; a file's tests stay together."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def data() -> Path:
    """The folder of published annotations, results and scores, which are no part of the project."""
    named = os.environ.get("FASTVLM_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"No data at {folder}; FASTVLM_DATA names the folder of published data.")
    return folder
