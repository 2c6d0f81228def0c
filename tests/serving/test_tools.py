"""Tools by the official client: what models are shown, and calls against the engine's replies."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from fastvlm import Dialogue, StructuredOutput, VisionLanguageModel
from fastvlm.serving.tool_formats import ToolFormat, tool_format
from tests.models import small_vlm
from tests.serving.calling import STOP, TOOLS, WEATHER, calling_vlm, saying
from tests.serving.serving import NAME, image_url, served

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

QUESTION: list[Any] = [{"role": "user", "content": "What is the weather?"}]
STRATEGIES = ["autoregressive", "prompt-lookup", "early-exit"]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln", "days": 2}}\n</tool_call>'
ARGUMENTS = {"place": "Köln", "days": 2}


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return calling_vlm("qwen")


def ask(client: openai.OpenAI, **options: Any) -> Any:
    """Return the first choice of a greedy reply."""
    words = {"model": NAME, "messages": QUESTION, "tools": TOOLS, "temperature": 0, **options}
    return client.chat.completions.create(max_tokens=300, **words).choices[0]


def streamed(client: openai.OpenAI, **options: Any) -> tuple[str, dict[int, dict[str, str]], Any]:
    """Return a stream's content, its calls by their numbers, and why it ended."""
    words = {"model": NAME, "messages": QUESTION, "tools": TOOLS, "temperature": 0, **options}
    content, calls, reason = "", {}, None
    words.setdefault("max_completion_tokens", 300)
    for chunk in client.chat.completions.create(stream=True, **words):
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for one in choice.delta.tool_calls or ():
            known = calls.setdefault(one.index, {"id": "", "name": "", "arguments": ""})
            known["id"] += one.id or ""
            known["name"] += one.function.name or ""
            known["arguments"] += one.function.arguments or ""
    return content, calls, reason


def form_of(vlm: VisionLanguageModel) -> ToolFormat:
    """Return the format of a model's calls."""
    found = tool_format(vlm.prompts, vlm.tokenizer)
    assert found is not None
    return found


def own(vlm: VisionLanguageModel, *, several: bool, functions: Any = None, **options: Any) -> Any:
    """Return the engine's own reply where calls are required."""
    schemas = {one["name"]: one.get("parameters") for one in functions or (WEATHER, STOP)}
    nothing = {"properties": {}, "additionalProperties": False}
    grammar = form_of(vlm).grammar(
        {name: one or nothing for name, one in schemas.items()}, several=several, required=True
    )
    return vlm.generate(
        Dialogue(QUESTION, TOOLS),
        structured=StructuredOutput("grammar", grammar),
        max_new_tokens=300,
        **options,
    )


def calls_in(text: str) -> list[tuple[str, Any]]:
    """Return the calls of a text that is nothing else, as Qwen writes them."""
    first, *calls = text.split("<tool_call>\n")
    assert not first
    bodies = [one.removesuffix("\n").removesuffix("\n</tool_call>") for one in calls]
    found = [json.loads(one) for one in bodies]
    return [(call["name"], call["arguments"]) for call in found]


def checked(calls: Any) -> list[tuple[str, Any]]:
    """Return calls with their arguments, which are valid."""
    found = [(one.function.name, json.loads(one.function.arguments)) for one in calls]
    for name, arguments in found:
        schema: dict[str, Any] = (
            WEATHER["parameters"] if name == "weather" else {"maxProperties": 0}
        )
        jsonschema.validate(arguments, schema)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_the_engines(
    client: openai.OpenAI, vlm: VisionLanguageModel, strategy: str, parallel: bool
) -> None:
    expected = own(vlm, several=parallel, strategy="autoregressive")
    assert own(vlm, several=parallel, strategy=strategy).token_ids == expected.token_ids
    words: dict[str, Any] = {
        "tool_choice": "required",
        "parallel_tool_calls": parallel,
        "extra_body": {"strategy": strategy},
    }
    found = ask(client, **words)
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    calls = checked(found.message.tool_calls)
    assert calls == calls_in(expected.text)
    assert parallel or len(calls) == 1
    ids = [one.id for one in found.message.tool_calls]
    assert len({*ids}) == len(ids)
    assert all(one.startswith("call_") for one in ids)
    content, pieces, reason = streamed(client, **words)
    assert (content, reason) == ("", "tool_calls")
    assert [*pieces] == [*range(len(calls))]
    assert [(one["name"], json.loads(one["arguments"])) for one in pieces.values()] == calls
    assert all(one["id"].startswith("call_") for one in pieces.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_named_function_is_called_once(
    client: openai.OpenAI, vlm: VisionLanguageModel, strategy: str
) -> None:
    chosen = set()
    for seed in (0, 3):
        expected = own(
            vlm, several=False, functions=[WEATHER], strategy=strategy, temperature=1.0, seed=seed
        )
        found = client.chat.completions.create(
            model=NAME, messages=QUESTION, tools=TOOLS, temperature=1, seed=seed, max_tokens=300,
            tool_choice={"type": "function", "function": {"name": "weather"}},
            extra_body={"strategy": strategy},
        ).choices[0]  # fmt: skip
        [(name, arguments)] = checked(found.message.tool_calls)
        assert [(name, arguments)] == calls_in(expected.text)
        assert name == "weather"
        chosen.add(json.dumps(arguments))
    assert len(chosen) > 1


@pytest.mark.parametrize("strategy", ["autoregressive", "early-exit"])
def test_several_choices_call_by_themselves(
    client: openai.OpenAI, vlm: VisionLanguageModel, strategy: str
) -> None:
    words: dict[str, Any] = {
        "model": NAME, "messages": QUESTION, "tools": TOOLS, "tool_choice": "required",
        "temperature": 1.5, "seed": 0, "n": 3, "max_tokens": 300,
        "extra_body": {"strategy": strategy},
    }  # fmt: skip
    expected = [
        calls_in(own(vlm, several=True, temperature=1.5, seed=row).text) for row in range(3)
    ]
    assert {len(calls) for calls in expected} == {1, 2}
    found = client.chat.completions.create(**words)
    assert [checked(one.message.tool_calls) for one in found.choices] == expected
    streams: list[dict[int, tuple[str, str]]] = [{}, {}, {}]
    for chunk in client.chat.completions.create(**words, stream=True):
        [choice] = chunk.choices
        for one in choice.delta.tool_calls or ():
            name, arguments = streams[choice.index].get(one.index, ("", ""))
            called = one.function
            streams[choice.index][one.index] = (
                name + (called.name or ""),
                arguments + called.arguments,
            )
    assert [
        [(name, json.loads(arguments)) for name, arguments in calls.values()] for calls in streams
    ] == expected


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"I look.\n{CALL}", "I look.", 1),
        (f"{CALL}\n{CALL}", "", 2),
        ("No call <tool_", "No call <tool_", 0),
        (CALL.replace("weather", "launch"), CALL.replace("weather", "launch"), 0),
        (CALL[:40], CALL[:40], 0),
        (f"a <tool_call>\n{{}}\n</tool_call> {CALL}", "a <tool_call>\n{}\n</tool_call>", 1),
    ],
)
def test_calls_of_the_models_own_accord(
    client: openai.OpenAI, vlm: VisionLanguageModel, text: str, content: str, calls: int
) -> None:
    with saying(vlm, text):
        found = ask(client)
        streams = streamed(client, logprobs=True)
    assert (found.message.content or "") == content
    assert found.finish_reason == ("tool_calls" if calls else "stop")
    assert [json.loads(one.function.arguments) for one in found.message.tool_calls or ()] == [
        ARGUMENTS
    ] * calls
    assert streams[0] == content
    assert [json.loads(one["arguments"]) for one in streams[1].values()] == [ARGUMENTS] * calls
    assert streams[2] == found.finish_reason


def test_a_stream_tells_of_every_token_beside_calls(
    client: openai.OpenAI, vlm: VisionLanguageModel
) -> None:
    with saying(vlm, f"I look.\n{CALL}"):
        tokens = ask(client, logprobs=True).logprobs.content
        chunks = client.chat.completions.create(
            model=NAME, messages=QUESTION, tools=TOOLS, temperature=0, max_tokens=300,
            stream=True, logprobs=True,
        )  # fmt: skip
        pieces = [one.choices[0].logprobs for one in chunks]
    streamed_tokens = [token for one in pieces if one is not None for token in one.content]
    assert [one.token for one in streamed_tokens] == [one.token for one in tokens]


def test_a_reply_cut_off_in_a_call(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    text = f"{CALL}\n{CALL}"
    count = len(vlm.tokenizer.encode(text[: text.rindex("ln")]))
    words: dict[str, Any] = {"model": NAME, "messages": QUESTION, "tools": TOOLS}
    with saying(vlm, text):
        found = client.chat.completions.create(**words, max_tokens=count).choices[0]
        _, calls, reason = streamed(client, max_completion_tokens=count)
    assert found.finish_reason == reason == "length"
    assert found.message.content is None
    first, second = (one.function.arguments for one in found.message.tool_calls)
    assert json.loads(first) == ARGUMENTS
    assert second == '{"place": "Kö'
    assert [one["arguments"] for one in calls.values()] == [first, second]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_arguments_stream_as_they_come(
    client: openai.OpenAI, vlm: VisionLanguageModel, choice: str
) -> None:
    with saying(vlm, f"{CALL}\n{CALL}"):
        chunks = client.chat.completions.create(
            model=NAME, messages=QUESTION, tools=TOOLS, temperature=0, max_tokens=300,
            stream=True, tool_choice=choice, extra_body={"return_drafted": True},
        )  # fmt: skip
        deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    for number in range(2):
        first, *more = [one for one in deltas if one.index == number]
        assert (first.function.name, first.type) == ("weather", "function")
        assert all(one.id is one.type is one.function.name is None for one in more)
        pieces = [one.function.arguments for one in (first, *more)]
        assert len([piece for piece in pieces if piece]) > 5
        assert "".join(pieces) == json.dumps(ARGUMENTS, ensure_ascii=False)


def test_the_clients_own_stream_reads_calls(
    client: openai.OpenAI, vlm: VisionLanguageModel
) -> None:
    with (
        saying(vlm, f"I look.\n{CALL}"),
        client.chat.completions.stream(
            model=NAME, messages=QUESTION, tools=TOOLS, temperature=0, max_tokens=300
        ) as stream,
    ):
        found = stream.get_final_completion().choices[0]
    assert (found.finish_reason, found.message.content) == ("tool_calls", "I look.")
    [call] = found.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_auto_is_the_reply_without_constraints(
    client: openai.OpenAI, vlm: VisionLanguageModel, strategy: str
) -> None:
    expected = vlm.generate(Dialogue(QUESTION, TOOLS), max_new_tokens=40)
    words: dict[str, Any] = {
        "model": NAME, "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 40,
        "extra_body": {"strategy": strategy},
    }  # fmt: skip
    found = client.chat.completions.create(**words)
    assert found.choices[0].message.content == expected.text
    chunks = client.chat.completions.create(**words, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == expected.text


def test_without_tools_the_prompt_shows_none(
    client: openai.OpenAI, vlm: VisionLanguageModel
) -> None:
    plain = vlm.generate(QUESTION, max_new_tokens=10)
    shown = vlm.generate(Dialogue(QUESTION, TOOLS), max_new_tokens=10)
    assert len(shown.prompt_token_ids) > len(plain.prompt_token_ids)
    for choice, expected in (("none", plain), ("auto", shown)):
        found = client.chat.completions.create(
            model=NAME, messages=QUESTION, tools=TOOLS, tool_choice=choice, max_tokens=10,
            temperature=0,
        )  # fmt: skip
        assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
        assert found.choices[0].message.content == expected.text
    # Nothing is read as a call then.
    with saying(vlm, CALL):
        assert ask(client, tool_choice="none").message.content == CALL


def test_the_whole_exchange(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": image_url(3)}},
        {"type": "text", "text": "Where is it?"},
    ]
    messages: list[Any] = [{"role": "user", "content": content}]
    with saying(vlm, f"I look.\n{CALL}"):
        first = ask(client, messages=messages).message
    [call] = first.tool_calls
    # The client's own object, as its documentation has it; others send all fields, and nothing.
    for sent in (first, {**first.model_dump(), "audio": None}):
        turns = [
            *messages,
            sent,
            {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
        ]
        found = client.chat.completions.create(
            model=NAME, messages=turns, tools=TOOLS, temperature=0, max_tokens=12
        )
        function = {"name": "weather", "arguments": ARGUMENTS}
        own_turns = [
            {"role": "user", "content": [{"type": "image", "image": image_url(3)}, content[1]]},
            {"role": "assistant", "content": "I look.",
             "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
            turns[-1],
        ]  # fmt: skip
        # The call is shown as the model wrote it, and its answer behind it.
        rendered = vlm.prompts.rendered(Dialogue(own_turns, TOOLS)).replace("\\u00f6", "ö")
        assert f"<|assistant|>I look.\n{CALL}<|end|>" in rendered
        assert rendered.endswith("<answer>Sunny.</answer><|assistant|>")
        expected = vlm.generate(Dialogue(own_turns, TOOLS), max_new_tokens=12)
        assert found.choices[0].message.content == expected.text
        assert found.usage.prompt_tokens == len(expected.prompt_token_ids)


@pytest.mark.parametrize("template", ["llama", "mistral"])
def test_other_formats(template: str) -> None:
    vlm = calling_vlm(template, special=template == "mistral")
    call = {"name": "weather", "parameters" if template == "llama" else "arguments": ARGUMENTS}
    text = json.dumps(call, ensure_ascii=False)
    with served(vlm) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for strategy in STRATEGIES[1:]:
            found = ask(client, tool_choice="required", extra_body={"strategy": strategy})
            assert found.finish_reason == "tool_calls"
            checked(found.message.tool_calls)
            assert own(vlm, several=True, strategy=strategy).text == own(vlm, several=True).text
        with saying(vlm, text if template == "llama" else f"[{text}]"):
            [called] = ask(client).message.tool_calls
        assert json.loads(called.function.arguments) == ARGUMENTS
        turns = [
            *QUESTION,
            {"role": "assistant", "tool_calls": [called]},
            {"role": "tool", "tool_call_id": called.id, "content": "Sunny."},
        ]
        words = {"model": NAME, "messages": turns, "tools": TOOLS, "max_tokens": 3}
        assert client.chat.completions.create(**words, temperature=0).choices[0].message.content
    if template == "mistral":
        reply = own(vlm, several=True)
        assert vlm.tokenizer.decode(reply.token_ids).startswith("[TOOL_CALLS][{")
        assert reply.token_ids[0] == vlm.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tool": ({"tools": []}, "tools"),
    "another kind": ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools.0"),
    "a name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0"),
    "a name twice": ({"tools": [*TOOLS, *TOOLS]}, "tools"),
    "a choice without tools": ({"tool_choice": "auto", "tools": None}, "tool_choice"),
    "an order without tools": ({"parallel_tool_calls": True, "tools": None}, "parallel_tool_calls"),
    "an unknown choice": (
        {"tool_choice": {"type": "function", "function": {"name": "b"}}},
        "tool_choice",
    ),
    "another choice": ({"tool_choice": "any"}, "tool_choice"),
    "a form beside it": ({"response_format": {"type": "json_object"}}, "tools"),
    "no object": (
        {"tools": [{"type": "function", "function": {
            "name": "a", "parameters": {"type": "string"}}}]},
        "tools.0.function.parameters",
    ),
    "no schema": (
        {
            "tools": [
                {"type": "function", "function": {
                    "name": "a", "parameters": {"properties": {"b": {"type": "nothing"}}}}}
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    "what can't be satisfied": (
        {
            "tools": [
                {"type": "function", "function": {
                    "name": "a", "parameters": {"required": ["b"], "properties": {"b": False}}}}
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    "what has no end": (
        {
            "tools": [
                {"type": "function", "function": {"name": "a", "parameters": {
                    "required": ["b"], "properties": {"b": {"$ref": "#"}}}}}
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    "an answer to nothing": (
        {"messages": [*QUESTION, {"role": "tool", "tool_call_id": "x", "content": "a"}]},
        "messages.1.tool_call_id",
    ),
    "an answer without a name": (
        {"messages": [*QUESTION, {"role": "tool", "content": "a"}]},
        "messages.1.tool_call_id",
    ),
    "a name of no answer": (
        {"messages": [{**QUESTION[0], "tool_call_id": "a"}]},
        "messages.0.tool_call_id",
    ),
    "a user's call": (
        {
            "messages": [
                {**QUESTION[0], "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "a", "arguments": "{}"}}]}
            ]
        },
        "messages.0.tool_calls",
    ),
    "arguments that are none": (
        {
            "messages": [
                *QUESTION,
                {"role": "assistant", "tool_calls": [
                    {"id": "a", "type": "function",
                     "function": {"name": "a", "arguments": "[1]"}}]},
            ]
        },
        "messages.1.tool_calls.0.function.arguments",
    ),
    "nothing said": ({"messages": [{"role": "assistant"}]}, "messages.0.content"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense(address: str, case: str) -> None:
    body, param = REFUSED[case]
    whole = {"messages": QUESTION, "tools": TOOLS, "max_tokens": 3, **body}
    found = httpx.post(f"{address}/v1/chat/completions", json=whole)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)


def test_models_without_tools_refuse_them() -> None:
    vlm = small_vlm(max_slots=4)
    answered = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "stop-it", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "Sunny."},
    ]  # fmt: skip
    other = "{% if tools %}{{ tools | tojson }}{% endif %}" + vlm.tokenizer.chat_template
    with served(vlm) as address:
        for template in (vlm.tokenizer.chat_template, other):
            vlm.tokenizer.chat_template = template
            for body, param in (
                ({"messages": QUESTION, "tools": TOOLS}, "tools"),
                ({"messages": answered}, "messages"),
            ):
                found = httpx.post(f"{address}/v1/chat/completions", json=body)
                assert found.status_code == 400
                assert found.json()["error"]["param"] == param
        body = {"messages": QUESTION, "tools": TOOLS, "tool_choice": "none", "max_tokens": 2}
        assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200
