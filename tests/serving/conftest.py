"""A small model, its server, and the official client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import torch

from fastvlm.vlm import VisionLanguageModel
from tests.models import small_vlm
from tests.serving.serving import served


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm(torch.float32, max_slots=4)


@pytest.fixture(scope="module")
def address(vlm: VisionLanguageModel) -> Iterator[str]:
    with served(vlm) as found:
        yield found


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
