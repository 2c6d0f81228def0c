"""Functions in the Responses API by the official client, against chats and the engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from fastvlm import Dialogue, VisionLanguageModel
from tests.models import small_vlm
from tests.serving.calling import STOP, TOOLS, WEATHER, calling_vlm, saying
from tests.serving.serving import NAME, image_url, served
from tests.serving.test_responses import END, START, events
from tests.serving.test_tools import ARGUMENTS, CALL, STRATEGIES, calls_in, own

pytest.importorskip("llguidance")

QUESTION = "What is the weather?"
FUNCTIONS: list[Any] = [{"type": "function", **one} for one in (WEATHER, STOP)]
CALLED: dict[str, Any] = {
    "type": "function_call", "call_id": "call_1", "name": "weather",
    "arguments": json.dumps(ARGUMENTS),
}  # fmt: skip
ANSWERED = {"type": "function_call_output", "call_id": "call_1", "output": "Sunny."}


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return calling_vlm("qwen")


def ask(client: openai.OpenAI, **options: Any) -> Any:
    """Return a greedy response."""
    words = {"model": NAME, "input": QUESTION, "tools": FUNCTIONS, "temperature": 0, **options}
    return client.responses.create(max_output_tokens=300, **words)


def calls_of(items: list[Any]) -> list[tuple[str, Any]]:
    """Return the calls among items."""
    return [
        (one["name"], json.loads(one["arguments"]))
        for one in items
        if one["type"] == "function_call"
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_required_calls_are_the_engines(
    client: openai.OpenAI, address: str, vlm: VisionLanguageModel, strategy: str
) -> None:
    expected = calls_in(own(vlm, several=True, strategy="autoregressive").text)
    found = ask(client, tool_choice="required", extra_body={"strategy": strategy})
    Response.model_validate(found.to_dict(), strict=True)
    assert found.status == "completed"
    assert calls_of(found.to_dict()["output"]) == expected
    assert [one.type for one in found.output] == ["function_call"] * len(expected)
    assert all(one.call_id.startswith("call_") for one in found.output)
    assert [tool.name for tool in found.tools] == ["weather", "stop-it"]
    body = {
        "input": QUESTION, "tools": FUNCTIONS, "tool_choice": "required", "temperature": 0,
        "strategy": strategy, "max_output_tokens": 300,
    }  # fmt: skip
    streamed = events(address, body)
    last = streamed[-1]["response"]
    assert calls_of(last["output"]) == expected
    done = [one for one in streamed if one["type"] == "response.function_call_arguments.done"]
    assert [json.loads(one["arguments"]) for one in done] == [one for _, one in expected]


def test_a_named_function_is_called_once(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    choice: Any = {"type": "function", "name": "weather"}
    expected = own(vlm, several=False, functions=[WEATHER])
    found = ask(client, tool_choice=choice)
    assert calls_of(found.to_dict()["output"]) == calls_in(expected.text)
    assert found.tool_choice.to_dict() == choice


def test_a_stream_tells_of_texts_and_calls(address: str, vlm: VisionLanguageModel) -> None:
    body = {
        "input": QUESTION, "tools": FUNCTIONS, "temperature": 0, "max_output_tokens": 300,
        "return_drafted": True,
    }  # fmt: skip
    with saying(vlm, f"I look.\n{CALL}\n{CALL} Yes."):
        found = events(address, body)
    kinds = [one["type"].removeprefix("response.") for one in found]
    counted = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    called = [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
    ]  # fmt: skip
    said = ["output_item.added", "content_part.added", "output_text.delta", *END]
    assert counted == [*START[:2], *said, *called, *called, *said, "completed"]
    output = found[-1]["response"]["output"]
    assert [one["content"][0]["text"] for one in (output[0], output[3])] == ["I look.", " Yes."]
    assert calls_of(output) == [("weather", ARGUMENTS)] * 2
    for number, item in enumerate(output):
        own_events = [one for one in found if one.get("output_index") == number]
        assert own_events[0]["item"]["id"] == own_events[-1]["item"]["id"] == item["id"]
        assert own_events[0]["item"]["status"] == "in_progress"
        assert own_events[-1]["item"] == item
        assert {one["item_id"] for one in own_events if "item_id" in one} == {item["id"]}
        deltas = [one["delta"] for one in own_events if "delta" in one]
        text = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert "".join(deltas) == text
        assert len(deltas) > 1
    drafted = [mark for one in found for mark in one.get("drafted", ())]
    assert len(drafted) == found[-1]["response"]["usage"]["output_tokens"]


def test_a_call_that_is_cut_off_is_incomplete(
    client: openai.OpenAI, address: str, vlm: VisionLanguageModel
) -> None:
    text = f"{CALL}\n{CALL}"
    count = len(vlm.tokenizer.encode(text[: text.rindex("ln")]))
    words = {"input": QUESTION, "tools": FUNCTIONS, "max_output_tokens": count}
    with saying(vlm, text):
        found = client.responses.create(model=NAME, **words).to_dict()
        streamed = events(address, words)[-1]
    assert found["status"] == "incomplete"
    assert streamed["type"] == "response.incomplete"
    for output in (found["output"], streamed["response"]["output"]):
        assert [one["status"] for one in output] == ["completed", "incomplete"]
        assert output[1]["arguments"] == '{"place": "Kö'


def test_the_clients_own_stream(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    with (
        saying(vlm, CALL),
        client.responses.stream(
            model=NAME, input=QUESTION, tools=FUNCTIONS, max_output_tokens=300, temperature=0
        ) as stream,
    ):
        [call] = stream.get_final_response().output
    assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)


def test_the_whole_exchange(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    shown = [
        {"type": "input_image", "image_url": image_url(3)},
        {"type": "input_text", "text": "Where is it?"},
    ]
    asked: list[Any] = [{"role": "user", "content": shown}]
    with saying(vlm, f"I look.\n{CALL}\n{CALL}"):
        first = ask(client, input=asked)
    said, *calls = first.output
    assert [one.type for one in first.output] == ["message", "function_call", "function_call"]
    content = [{"type": "image", "image": image_url(3)}, {"type": "text", "text": "Where is it?"}]
    function = {"name": "weather", "arguments": ARGUMENTS}
    turns: list[Any] = [
        {"role": "user", "content": content},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look."}],
            "tool_calls": [
                {"id": one.call_id, "type": "function", "function": function} for one in calls
            ],
        },
        *(
            {"role": "tool", "tool_call_id": one.call_id, "name": "weather", "content": answer}
            for one, answer in zip(calls, ("Sunny.", "Rain."), strict=True)
        ),
    ]
    expected = vlm.generate(Dialogue(turns, TOOLS), max_new_tokens=12)
    outputs = [
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "Sunny."},
        {"type": "function_call_output", "call_id": calls[1].call_id,
         "output": [{"type": "input_text", "text": "Rain."}]},
    ]  # fmt: skip
    # The client's own objects; others send all fields, and nothing.
    for items in ([said, *calls], [one.model_dump() for one in (said, *calls)]):
        found = client.responses.create(
            model=NAME, input=[*asked, *items, *outputs], tools=FUNCTIONS, temperature=0,
            max_output_tokens=12,
        )  # fmt: skip
        assert found.output_text == expected.text
        assert found.usage.input_tokens == len(expected.prompt_token_ids)


def test_without_tools_the_prompt_shows_none(
    client: openai.OpenAI, vlm: VisionLanguageModel
) -> None:
    user = [{"role": "user", "content": QUESTION}]
    plain = vlm.generate(user, max_new_tokens=10)
    shown = vlm.generate(Dialogue(user, TOOLS), max_new_tokens=10)
    for choice, expected in (("none", plain), ("auto", shown)):
        found = client.responses.create(
            model=NAME, input=QUESTION, tools=FUNCTIONS, tool_choice=choice, temperature=0,
            max_output_tokens=10,
        )  # fmt: skip
        assert found.usage.input_tokens == len(expected.prompt_token_ids)
        assert found.output_text == expected.text
    with saying(vlm, CALL):
        assert ask(client, tool_choice="none").output_text == CALL


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    "a custom tool": ({"tools": [{"type": "custom", "name": "a"}]}, "tools.0.type"),
    "a chat's tool": ({"tools": TOOLS}, "tools.0"),
    "a name": ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
    "a name twice": ({"tools": [*FUNCTIONS, *FUNCTIONS]}, "tools"),
    "no object": (
        {"tools": [{"type": "function", "name": "a", "parameters": {"type": "string"}}]},
        "tools.0.parameters",
    ),
    "a field": ({"tools": [{**FUNCTIONS[1], "defer_loading": True}]}, "tools.0.defer_loading"),
    "a choice without tools": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "an unknown choice": ({"tool_choice": {"type": "function", "name": "b"}}, "tool_choice"),
    "another choice": ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
    "a form beside it": ({"text": {"format": {"type": "json_object"}}}, "tools"),
    "log-probabilities": ({"include": ["message.output_text.logprobs"]}, "include"),
    "what can't be satisfied": (
        {
            "tools": [{"type": "function", "name": "a", "parameters": {
                "required": ["b"], "properties": {"b": False}}}],
            "tool_choice": "required",
        },
        "tools",
    ),
    "an answer to nothing": ({"input": [ANSWERED]}, "input.0.call_id"),
    "an answer without a name": (
        {"input": [CALLED, {"type": "function_call_output", "output": "a"}]},
        "input.1.call_id",
    ),
    "arguments that are none": ({"input": [{**CALLED, "arguments": "[1]"}]}, "input.0.arguments"),
    "a file": (
        {"input": [CALLED, {**ANSWERED, "output": [{"type": "input_file"}]}]},
        "input.1.output.0",
    ),
    "another item": ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0"),
    "reasoning": ({"input": [{"type": "reasoning", "id": "a", "summary": []}]}, "input.0"),
    "no item": ({"input": [1]}, "input.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense(address: str, case: str) -> None:
    body, param = REFUSED[case]
    whole = {"input": QUESTION, "tools": FUNCTIONS, "max_output_tokens": 3, **body}
    found = httpx.post(f"{address}/v1/responses", json=whole)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)


def test_models_without_tools_refuse_them() -> None:
    with served(small_vlm(max_slots=4)) as address:
        for body, param in (
            ({"input": QUESTION, "tools": FUNCTIONS}, "tools"),
            ({"input": [CALLED, ANSWERED]}, "input"),
        ):
            found = httpx.post(f"{address}/v1/responses", json=body)
            assert found.status_code == 400
            assert found.json()["error"]["param"] == param
