"""The server by the official JavaScript client, against the engine's own replies."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import SCENE_PROMPT
from tests.models import small_vlm
from tests.serving.npm import npm_package
from tests.serving.serving import NAME, served
from tests.serving.test_server import image_url, own

pytestmark = pytest.mark.slow

CLIENT = Path(__file__).parent / "javascript" / "client.mjs"
SCENE = 3


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm(torch.float32, max_slots=4)


@pytest.fixture(scope="module")
def found(vlm: VisionLanguageModel) -> Any:
    """What the client was told."""
    folder = npm_package("openai", "7")
    node = shutil.which("node")
    assert node is not None  # npm is there
    with served(vlm) as address:
        command = [node, str(CLIENT), address, NAME, image_url(SCENE), SCENE_PROMPT]
        done = subprocess.run(command, cwd=folder.parent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_replies_are_the_engines(found: Any, vlm: VisionLanguageModel) -> None:
    greedy = own(vlm, SCENE, max_new_tokens=20)
    seeds = [
        own(vlm, SCENE, max_new_tokens=20, temperature=0.7, seed=5 + row).text for row in range(3)
    ]
    assert found["models"] == [NAME]
    assert found["whole"] == [greedy.text]
    assert found["sampled"] == seeds[:1]
    assert found["choices"] == seeds
    assert found["streamed"]["text"] == greedy.text
    assert found["sampledStreamed"]["text"] == seeds[0]
    assert found["streamed"]["usage"]["completion_tokens"] == 20


def test_log_probabilities(found: Any, vlm: VisionLanguageModel) -> None:
    expected = own(vlm, SCENE, max_new_tokens=20, logprobs=2)
    # The prompt's beginning comes from the prefix cache, and rounds as it does there.
    known = [one.logprob for one in expected.logprobs]
    assert found["logprobs"] == pytest.approx(known, abs=1e-4)


def test_a_reply_of_a_form(found: Any) -> None:
    assert isinstance(found["form"]["number"], int)
    assert found["form"]["colour"] in ("red", "blue")


def test_errors_are_the_clients_own(found: Any) -> None:
    assert found["refused"] == {"kind": "BadRequestError", "status": 400, "param": "temperature"}
    assert found["unknown"] == {"kind": "NotFoundError", "status": 404, "param": "model"}
