"""What every test can count on: no network, one thread, and the same seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import random

import pytest
import torch

# Sums of floats depend on it, and the threads of a small model only wait for one another: on a
# machine that is busy with something else, two take a hundred times as long as one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
