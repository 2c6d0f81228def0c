"""`/tokenize` and `/detokenize` against the tokenizer and the engine."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from fastvlm.vlm import VisionLanguageModel
from tests.models import VISUAL_TOKENS
from tests.serving.serving import NAME, asked

TEXT = "a red circle"


def test_a_text(address: str, vlm: VisionLanguageModel) -> None:
    expected = vlm.tokenizer(TEXT).input_ids
    body = {"model": NAME, "prompt": TEXT, "return_token_strs": True}
    found = httpx.post(f"{address}/tokenize", json=body).json()
    assert found == {
        "count": len(expected),
        "max_model_len": vlm.decoder.context,
        "tokens": expected,
        "token_strs": vlm.tokenizer.convert_ids_to_tokens(expected),
    }
    found = httpx.post(f"{address}/detokenize", json={"tokens": expected}).json()
    assert found == {"prompt": TEXT}
    assert httpx.post(f"{address}/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert httpx.post(f"{address}/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize("size", [None, 256])
def test_a_dialogue_with_its_visual_tokens(
    address: str, client: openai.OpenAI, vlm: VisionLanguageModel, size: int | None
) -> None:
    shown = {} if size is None else {"image_size": size}
    found = httpx.post(f"{address}/tokenize", json={"messages": asked(3), **shown}).json()
    image = vlm.model.config.image_token_id
    assert found["tokens"].count(image) == VISUAL_TOKENS * (1 if size is None else 4)
    assert found["count"] == len(found["tokens"])
    reply = client.chat.completions.create(
        model=NAME, messages=asked(3), max_tokens=1, extra_body=shown
    )
    assert reply.usage.prompt_tokens == found["count"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("tokenize", {}),
        ("tokenize", {"prompt": TEXT, "messages": asked(1)}),
        ("tokenize", {"messages": asked(1), "add_special_tokens": True}),
        ("tokenize", {"messages": asked(1), "add_generation_prompt": False}),
        ("tokenize", {"prompt": TEXT, "image_size": 128}),
        ("tokenize", {"prompt": [TEXT]}),
        ("tokenize", {"prompt": TEXT, "nonsense": 1}),
        ("detokenize", {"tokens": [-1]}),
        ("detokenize", {"tokens": [10**9]}),
        ("detokenize", {"tokens": ["5"]}),
        ("detokenize", {}),
    ],
)
def test_what_makes_no_sense_is_refused(address: str, path: str, body: dict[str, Any]) -> None:
    found = httpx.post(f"{address}/{path}", json=body)
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_other_models_are_not_served(address: str) -> None:
    for path, body in (("tokenize", {"prompt": TEXT}), ("detokenize", {"tokens": [5]})):
        found = httpx.post(f"{address}/{path}", json={**body, "model": "other"})
        assert found.status_code == 404
