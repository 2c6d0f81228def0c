"""The Responses API by the official client, against the engine's own replies."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import SCENE_PROMPT
from fastvlm_example.scenes import render, sample
from tests.serving.serving import NAME, image_url, served, slowed

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
START = ["created", "in_progress", "output_item.added", "content_part.added"]
END = ["output_text.done", "content_part.done", "output_item.done"]


def about(scene: int, text: str = SCENE_PROMPT) -> list[Any]:
    """Return a question about a scene as the API has it."""
    content = [
        {"type": "input_image", "image_url": image_url(scene), "detail": "auto"},
        {"type": "input_text", "text": text},
    ]
    return [{"role": "user", "content": content}]


def dialogue(scene: int, *more: tuple[str, str]) -> list[Any]:
    """Return a question about a scene, and what was said then, as the engine takes it."""
    shown = {"type": "image", "image": render(sample(scene), 128)}
    turns = [{"role": "user", "content": [shown, {"type": "text", "text": SCENE_PROMPT}]}]
    turns += [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in more]
    return turns


def events(address: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a stream's events; each is named as its data are, and valid."""
    found = httpx.post(f"{address}/v1/responses", json={**body, "stream": True})
    assert found.headers["content-type"].startswith("text/event-stream")
    parsed = []
    for block in found.text.strip().split("\n\n"):
        name, data = block.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        EVENT.validate_python(content, strict=True)
        parsed.append(content)
    assert [one["sequence_number"] for one in parsed] == list(range(len(parsed)))
    return parsed


@pytest.mark.parametrize("drawn", [{"temperature": 0}, {"temperature": 0.8, "seed": 4}])
def test_a_response_is_the_engines(
    client: openai.OpenAI, vlm: VisionLanguageModel, drawn: dict[str, Any]
) -> None:
    sampling = drawn if drawn["temperature"] else {}
    expected = vlm.generate(dialogue(3), max_new_tokens=20, **sampling)
    found = client.responses.create(
        model=NAME, input=about(3), max_output_tokens=20, metadata={"a": "b"}, store=False,
        user="u", extra_body={"strategy": "early-exit", "return_drafted": True, **drawn},
    )  # fmt: skip
    assert found.output_text == expected.text
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage.input_tokens == len(expected.prompt_token_ids)
    assert found.usage.output_tokens == 20
    assert found.usage.total_tokens == 20 + len(expected.prompt_token_ids)
    assert found.usage.output_tokens_details.accepted_prediction_tokens == sum(found.drafted)
    assert len(found.drafted) == 20
    assert (found.metadata, found.user, found.store) == ({"a": "b"}, "u", False)
    Response.model_validate(found.to_dict(), strict=True)


@pytest.mark.parametrize("strategy", ["autoregressive", "prompt-lookup", "early-exit"])
def test_a_stream_has_the_official_events(
    address: str, vlm: VisionLanguageModel, strategy: str
) -> None:
    expected = vlm.generate(dialogue(4), max_new_tokens=24, temperature=0.7, seed=5)
    body = {
        "input": about(4), "max_output_tokens": 24, "temperature": 0.7, "seed": 5,
        "strategy": strategy, "return_drafted": True,
    }  # fmt: skip
    found = events(address, body)
    kinds = [one["type"].removeprefix("response.") for one in found]
    deltas = [one for one in found if one["type"] == "response.output_text.delta"]
    assert kinds == [*START, *["output_text.delta"] * len(deltas), *END, "incomplete"]
    assert len(deltas) > 4
    assert "".join(one["delta"] for one in deltas) == expected.text
    drafted = [one for delta in deltas for one in delta["drafted"]]
    assert len(drafted) == 24
    text, part, item, last = found[-4:]
    assert text["text"] == part["part"]["text"] == expected.text
    assert item["item"]["content"] == [part["part"]]
    assert last["response"]["output"] == [item["item"]]
    assert last["response"]["id"] == found[0]["response"]["id"]
    assert last["response"]["usage"]["output_tokens"] == 24
    assert {one["item_id"] for one in deltas} == {item["item"]["id"]}
    assert [one["response"]["status"] for one in found[:2]] == ["in_progress"] * 2


def test_the_clients_own_stream(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    expected = vlm.generate(SCENE_PROMPT, max_new_tokens=12).text
    with client.responses.stream(
        model=NAME, input=SCENE_PROMPT, max_output_tokens=12, temperature=0
    ) as stream:
        deltas = [one.delta for one in stream if one.type == "response.output_text.delta"]
    assert "".join(deltas) == expected


def test_instructions_and_earlier_replies(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    options: dict[str, Any] = {"max_output_tokens": 8, "temperature": 0}
    first = client.responses.create(model=NAME, input=about(5), **options)
    said = first.output_text
    again = [*about(5), *first.output, {"role": "user", "content": "Again."}]
    second = client.responses.create(model=NAME, input=again, instructions="Be brief.", **options)
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    messages = [system, *dialogue(5, ("assistant", said), ("user", "Again."))]
    expected = vlm.generate(messages, max_new_tokens=8)
    assert second.output_text == expected.text
    assert second.usage.input_tokens == len(expected.prompt_token_ids)
    # What was computed for the first is not computed again.
    third = client.responses.create(model=NAME, input=about(5), **options)
    assert third.usage.input_tokens_details.cached_tokens > 0
    assert third.output_text == said


def test_log_probabilities(client: openai.OpenAI, address: str, vlm: VisionLanguageModel) -> None:
    expected = vlm.generate(SCENE_PROMPT, max_new_tokens=6, logprobs=2)
    asked: dict[str, Any] = {
        "input": SCENE_PROMPT, "max_output_tokens": 6, "temperature": 0, "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }  # fmt: skip
    whole = client.responses.create(model=NAME, **asked).output[0].content[0].logprobs
    assert [one.logprob for one in whole] == pytest.approx(
        [one.logprob for one in expected.logprobs]
    )
    assert all(len(one.top_logprobs) == 2 for one in whole)
    found = events(address, asked)
    streamed = [
        one
        for event in found
        if event["type"] == "response.output_text.delta"
        for one in event["logprobs"]
    ]
    assert streamed == [one.to_dict() for one in whole]
    assert found[-4]["logprobs"] == streamed


def test_a_response_of_a_form_is_completed(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")

    class Answer(pydantic.BaseModel):
        number: int
        colour: str

    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    text: Any = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    options: dict[str, Any] = {
        "model": NAME, "input": about(8), "max_output_tokens": 200, "temperature": 0,
    }  # fmt: skip
    found = client.responses.create(**options, text=text)
    assert found.status == "completed"
    assert found.incomplete_details is None
    assert json.loads(found.output_text)["colour"] in ("red", "blue")
    assert found.text.format.to_dict() == text["format"]
    found = client.responses.create(**options, extra_body={"guided_choice": ["yes", "no"]})
    assert found.output_text in ("yes", "no")


def test_a_stream_that_fails_says_so(vlm: VisionLanguageModel) -> None:
    body = {"input": about(1), "max_output_tokens": 200}
    with served(vlm, request_seconds=1) as address, slowed(vlm):
        last = events(address, body)[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
        assert httpx.post(f"{address}/v1/responses", json=body).status_code == 408
    assert not vlm.engine.slots


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input"),
        (
            {
                "input": [
                    {
                        "role": "user",
                        "content": [{"type": "input_image", "image_url": "http://10.0.0.1/a.png"}],
                    }
                ]
            },
            "input.0.content.0.image_url",
        ),
    ],
)
def test_what_is_not_supported_is_refused(address: str, body: dict[str, Any], param: str) -> None:
    found = httpx.post(f"{address}/v1/responses", json={"input": "Hello.", **body})
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
