"""Completions by the official client, against the engine's own replies to the same tokens."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from tokenizers.processors import TemplateProcessing

from fastvlm.functional.messages import TokenPrompt
from fastvlm.vlm import VisionLanguageModel
from tests.serving.serving import NAME, served

TEXT = "a red circle left of"
OTHER = "two blue squares"


def tokens(vlm: VisionLanguageModel, text: str) -> list[int]:
    return vlm.tokenizer.encode(text)


def own(vlm: VisionLanguageModel, text: str, **options: Any) -> Any:
    """Return the engine's own reply to a text's tokens."""
    return vlm.generate(TokenPrompt(tokens(vlm, text)), **options)


def complete(client: openai.OpenAI, prompt: Any = TEXT, **options: Any) -> Any:
    return client.completions.create(model=NAME, prompt=prompt, **options)


def streamed(client: openai.OpenAI, prompt: Any = TEXT, **options: Any) -> list[Any]:
    return list(complete(client, prompt, stream=True, **options))


@pytest.mark.parametrize("strategy", ["autoregressive", "prompt-lookup", "early-exit"])
@pytest.mark.parametrize("drawn", [{"temperature": 0}, {"temperature": 0.8, "seed": 4}])
def test_a_completion_is_the_engines(
    client: openai.OpenAI, vlm: VisionLanguageModel, strategy: str, drawn: dict[str, Any]
) -> None:
    sampling = drawn if drawn["temperature"] else {}
    expected = own(vlm, TEXT, max_new_tokens=20, **sampling)
    options = {**drawn, "max_tokens": 20, "extra_body": {"strategy": strategy}}
    found = complete(client, **options)
    assert found.object == "text_completion"
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(tokens(vlm, TEXT))
    assert found.usage.completion_tokens == 20
    chunks = streamed(client, stream_options={"include_usage": True}, **options)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected.text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_prompts_in_all_forms(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    expected = [
        own(vlm, text, max_new_tokens=16, temperature=1.0, seed=3 + i).text
        for text in (TEXT, OTHER)
        for i in range(2)
    ]
    one, two = tokens(vlm, TEXT), tokens(vlm, OTHER)
    for several in ([TEXT, OTHER], [one, two]):
        # 16 tokens unless told otherwise, as OpenAI has it.
        found = complete(client, several, temperature=1, seed=3, n=2)
        assert [choice.text for choice in found.choices] == expected
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        assert found.usage.prompt_tokens == len(one) + len(two)
        texts = [""] * 4
        for chunk in streamed(client, several, temperature=1, seed=3, n=2):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected
    for alone in (TEXT, [TEXT], one, [one]):
        found = complete(client, alone, temperature=1, seed=3)
        assert [choice.text for choice in found.choices] == expected[:1]


def test_echo_repeats_the_prompt(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    expected = [text + own(vlm, text, max_new_tokens=6).text for text in (TEXT, OTHER)]
    options: dict[str, Any] = {"echo": True, "max_tokens": 6, "temperature": 0}
    for prompts in ([TEXT, OTHER], [tokens(vlm, TEXT), tokens(vlm, OTHER)]):
        found = complete(client, prompts, **options)
        assert [choice.text for choice in found.choices] == expected
        texts = ["", ""]
        for chunk in streamed(client, prompts, **options):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected


@pytest.mark.parametrize("number", [0, 3])
def test_log_probabilities(client: openai.OpenAI, vlm: VisionLanguageModel, number: int) -> None:
    expected = own(vlm, TEXT, max_new_tokens=12, logprobs=number)
    options = {"max_tokens": 12, "temperature": 0, "logprobs": number}
    choice = complete(client, **options).choices[0]
    found = choice.logprobs
    texts = [vlm.tokenizer.decode([one.token_id]) for one in expected.logprobs]
    assert found.tokens == texts
    assert found.token_logprobs == pytest.approx([one.logprob for one in expected.logprobs])
    for top, one in zip(found.top_logprobs, expected.logprobs, strict=True):
        known = {**one.top, one.token_id: one.logprob}
        assert len(known) in (number, number + 1)
        likeliest: dict[str, float] = {}
        for token, logprob in sorted(known.items(), key=lambda pair: pair[1]):
            likeliest[vlm.tokenizer.decode([token])] = logprob
        assert top == pytest.approx(likeliest)
    parts = [c.choices[0].logprobs for c in streamed(client, **options) if c.choices[0].logprobs]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        whole = getattr(found, field)
        assert [one for part in parts for one in getattr(part, field)] == whole


def test_where_tokens_stand_in_the_text(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    choice = complete(
        client, max_tokens=40, temperature=0, logprobs=0,
        extra_body={"guided_regex": "[a-zé ]{12}é"},
    ).choices[0]  # fmt: skip
    found = choice.logprobs
    ends = [*found.text_offset[1:], len(choice.text)]
    cut = [choice.text[a:b] for a, b in zip(found.text_offset, ends, strict=True)]
    assert "".join(cut) == choice.text
    # The bytes of a character stand where it stands, and the end token has no text.
    for text, token in zip(cut, found.tokens, strict=True):
        assert text == token or token in ("\N{REPLACEMENT CHARACTER}", "<|end|>")
    assert found.tokens[-1] == "<|end|>"
    assert len(set(found.text_offset)) > 3


def test_which_tokens_were_drafted(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "max_tokens": 24, "temperature": 0, "stream_options": {"include_usage": True},
        "extra_body": {"strategy": "early-exit", "return_drafted": True},
    }  # fmt: skip
    chunks = streamed(client, **options)
    drafted = [one for c in chunks if c.choices for one in getattr(c.choices[0], "drafted", [])]
    del options["stream_options"]
    assert complete(client, **options).choices[0].drafted == drafted
    assert len(drafted) == 24
    counted = chunks[-1].usage.completion_tokens_details
    assert counted.accepted_prediction_tokens == sum(drafted)


def test_special_tokens_are_the_tokenizers(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    token = vlm.tokenizer.convert_tokens_to_ids("<|user|>")
    backend = vlm.tokenizer.backend_tokenizer
    before = backend.post_processor
    without = tokens(vlm, TEXT)
    backend.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", token)]
    )
    try:
        for add, expected in ((True, [token, *without]), (False, without)):
            found = complete(
                client, max_tokens=8, temperature=0, extra_body={"add_special_tokens": add}
            )
            own_reply = vlm.generate(TokenPrompt(expected), max_new_tokens=8)
            assert found.choices[0].text == own_reply.text
            assert found.usage.prompt_tokens == len(expected)
    finally:
        backend.post_processor = before


@pytest.fixture
def _ending(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the third token of the greedy replies be one that ends them."""
    prompts = (TokenPrompt(tokens(vlm, TEXT)), TEXT)
    ends = [vlm.generate(prompt, max_new_tokens=3).token_ids[2] for prompt in prompts]
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", ends)


@pytest.mark.usefixtures("_ending")
@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_the_length_that_load_tools_ask_for(
    address: str, vlm: VisionLanguageModel, path: str
) -> None:
    asked = {
        "completions": {"prompt": TEXT, "max_tokens": 20},
        "chat/completions": {
            "messages": [{"role": "user", "content": TEXT}],
            "max_completion_tokens": 20,
        },
        "responses": {"input": TEXT, "max_output_tokens": 20},
    }[path]
    prompt: Any = TokenPrompt(tokens(vlm, TEXT)) if path == "completions" else TEXT

    def text(answer: dict[str, Any]) -> str:
        if path == "responses":
            return str(answer["output"][0]["content"][0]["text"])
        [choice] = answer["choices"]
        return str(choice["text"] if path == "completions" else choice["message"]["content"])

    cases: list[tuple[dict[str, Any], dict[str, Any], range]] = [
        ({}, {}, range(1, 4)),
        ({"ignore_eos": True}, {"ignore_eos": True}, range(20, 21)),
        ({"min_tokens": 9}, {"min_new_tokens": 9}, range(9, 21)),
    ]
    for fields, options, lengths in cases:
        body = {"temperature": 0, "strategy": "early-exit", **asked, **fields}
        answer = httpx.post(f"{address}/v1/{path}", json=body).json()
        assert text(answer) == vlm.generate(prompt, max_new_tokens=20, **options).text
        usage = answer["usage"]
        assert usage["output_tokens" if path == "responses" else "completion_tokens"] in lengths


def test_what_vllms_load_generator_sends(address: str, vlm: VisionLanguageModel) -> None:
    body = {
        "model": NAME, "prompt": tokens(vlm, TEXT), "repetition_penalty": 1.0, "max_tokens": 10,
        "logprobs": None, "stream": True, "ignore_eos": True, "temperature": 0.0, "top_p": None,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    found = httpx.post(f"{address}/v1/completions", json=body)
    assert found.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    texts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
    assert "".join(texts) == own(vlm, TEXT, max_new_tokens=10, ignore_eos=True).text
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"]["completion_tokens"] <= 10 for chunk in chunks)
    assert chunks[-1]["usage"]["completion_tokens"] == 10
    assert chunks[-1]["usage"]["prompt_tokens"] == len(body["prompt"])


def test_completions_of_a_form_and_up_to_a_string(
    client: openai.OpenAI, vlm: VisionLanguageModel
) -> None:
    pytest.importorskip("llguidance")
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0}
    found = complete(client, **options, extra_body={"guided_choice": ["yes", "no"]})
    assert found.choices[0].text in ("yes", "no")
    assert found.choices[0].finish_reason == "stop"
    found = complete(client, **options, extra_body={"guided_regex": "[0-9]{3}"})
    assert found.choices[0].text.isdigit()
    whole = own(vlm, TEXT, max_new_tokens=60).text
    stop = whole[10:13]
    found = complete(client, **options, stop=stop)
    assert found.choices[0].text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [10**9]}, None),
        ({"prompt": [10**9], "echo": True}, "prompt"),
        ({"prompt": "an <image>"}, None),
        ({"prompt": None}, "prompt"),
        ({"messages": []}, "messages"),
        ({"ignore_eos": True, "guided_regex": "a"}, None),
    ],
)
def test_what_is_not_supported_is_refused(
    address: str, body: dict[str, Any], param: str | None
) -> None:
    found = httpx.post(f"{address}/v1/completions", json={"prompt": TEXT, **body})
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"].startswith(param)


def test_a_prompt_that_is_refused_leaves_nothing_behind(
    address: str, vlm: VisionLanguageModel
) -> None:
    body = {"prompt": [tokens(vlm, TEXT), [10**9]], "max_tokens": 200}
    assert httpx.post(f"{address}/v1/completions", json=body).status_code == 400
    found = httpx.post(f"{address}/v1/completions", json={"prompt": TEXT, "max_tokens": 1})
    assert found.status_code == 200
    assert not vlm.engine.slots
    assert not vlm.engine.waiting


def test_prompts_count_for_whether_there_is_room(vlm: VisionLanguageModel) -> None:
    with served(vlm, max_waiting=0) as address:
        body = {"prompt": [TEXT] * 3, "n": 2, "max_tokens": 1}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 400
        body = {"prompt": [TEXT] * 2, "n": 2, "max_tokens": 1}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200
