"""These tests need a GPU; the variable FASTVLM_TEST_DEVICE names another device to run them on."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    found = torch.device(os.environ.get("FASTVLM_TEST_DEVICE", "cuda"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("There is no CUDA device; FASTVLM_TEST_DEVICE=cpu runs this on the CPU.")
    # Products in TF32 differ by more than what decides between two tokens.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return found
