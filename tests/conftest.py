"""What every test can count on: no network, two threads, and the same seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import random

import pytest
import torch

torch.set_num_threads(2)  # sums of floats depend on it


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
