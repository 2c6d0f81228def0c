"""The server by the official JavaScript client, against the engine's own replies."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvlm import Dialogue, StructuredOutput
from fastvlm.serving.tool_formats import tool_format
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import SCENE_PROMPT
from fastvlm_example.scenes import render, sample
from tests.models import small_vlm
from tests.serving.calling import calling_vlm
from tests.serving.npm import npm_package
from tests.serving.serving import NAME, served
from tests.serving.test_server import image_url, own

pytestmark = pytest.mark.slow

CLIENT = Path(__file__).parent / "javascript" / "client.mjs"
SCENE = 3


def told(vlm: VisionLanguageModel, what: str) -> Any:
    """Return what the client was told by the server of a model.

    Args:
        vlm: The model.
        what: What it asks: one of the functions of `client.mjs`.
    """
    folder = npm_package("openai", "7")
    node = shutil.which("node")
    assert node is not None  # npm is there
    with served(vlm) as address:
        command = [node, str(CLIENT), what, address, NAME, image_url(SCENE), SCENE_PROMPT]
        done = subprocess.run(command, cwd=folder.parent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm(torch.float32, max_slots=4)


@pytest.fixture(scope="module")
def calling() -> VisionLanguageModel:
    pytest.importorskip("llguidance")
    return calling_vlm("qwen")


@pytest.fixture(scope="module")
def found(vlm: VisionLanguageModel) -> Any:
    """What the client was told in chats."""
    return told(vlm, "chats")


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


def shown(*more: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the question about the scene, and further turns, as the engine takes them."""
    image = {"type": "image", "image": render(sample(SCENE), 128)}
    return [
        {"role": "user", "content": [image, {"type": "text", "text": SCENE_PROMPT}]},
        *more,
    ]


def called(calls: list[Any], ids: list[str]) -> list[dict[str, Any]]:
    """Return the turns of calls, which are checked, and their answers as the engine takes them."""
    for one in calls:
        assert one["name"] == "weather"
        arguments = json.loads(one["arguments"])
        assert arguments["place"] in ("Rome", "Köln")
        assert isinstance(arguments["days"], int)
    functions = [{"name": "weather", "arguments": json.loads(one["arguments"])} for one in calls]
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": name, "type": "function", "function": function}
            for name, function in zip(ids, functions, strict=True)
        ],
    }
    answers = [
        {"role": "tool", "tool_call_id": name, "name": "weather", "content": "Sunny."}
        for name in ids
    ]
    return [turn, *answers]


WEATHER = {
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"enum": ["Rome", "Köln"]},
            "days": {"type": "integer", "maximum": 9},
        },
        "required": ["place", "days"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]


def test_tools(calling: VisionLanguageModel) -> None:
    found = told(calling, "chatTools")
    assert found["reason"] == "tool_calls"
    functions = [one["function"] for one in found["calls"]]
    turns = called(functions, [one["id"] for one in found["calls"]])
    streamed: dict[int, dict[str, str]] = {}
    for one in found["deltas"]:
        known = streamed.setdefault(one["index"], {"name": "", "arguments": ""})
        known["name"] += one["function"].get("name", "")
        known["arguments"] += one["function"]["arguments"]
    assert list(streamed.values()) == functions
    assert len(found["deltas"]) > len(functions)
    called(found["named"], ["a"])
    assert found["followed"] == [
        calling.generate(Dialogue(shown(*turns), TOOLS), max_new_tokens=12).text
    ]
    assert found["none"] == [calling.generate(shown(), max_new_tokens=20).text]


def test_responses(vlm: VisionLanguageModel) -> None:
    found = told(vlm, "responses")
    expected = vlm.generate(shown(), max_new_tokens=20).text
    assert found["text"] == vlm.generate(SCENE_PROMPT, max_new_tokens=20).text
    assert found["image"] == found["helped"] == expected
    assert found["status"] == "incomplete"
    deltas = [one for one in found["events"] if one["type"] == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(one["delta"] for one in deltas) == expected
    assert found["events"][-1]["type"] == "response.incomplete"


def test_tools_of_responses(calling: VisionLanguageModel) -> None:
    found = told(calling, "responseTools")
    assert {one["type"] for one in found["calls"]} == {"function_call"}
    turns = called(found["calls"], [one["call_id"] for one in found["calls"]])
    deltas = [
        one for one in found["events"] if one["type"] == "response.function_call_arguments.delta"
    ]
    texts = ["" for _ in found["calls"]]
    for one in deltas:
        texts[one["output_index"]] += one["delta"]
    assert texts == [one["arguments"] for one in found["calls"]]
    assert len(deltas) > len(texts)
    # The functions are strict, which holds a reply of the model's own accord to their schemas.
    form = tool_format(calling.prompts, calling.tokenizer)
    assert form is not None
    grammar = form.grammar({"weather": WEATHER["parameters"]}, several=True, required=False)
    expected = calling.generate(
        Dialogue(shown(*turns), TOOLS),
        max_new_tokens=12,
        structured=StructuredOutput("grammar", grammar),
    )
    assert found["followed"] == expected.text
