"""The server by the official client, against the engine's own replies."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import SCENE_PROMPT
from fastvlm_example.scenes import render, sample
from tests.decoding.conftest import imitation
from tests.models import small_vlm
from tests.serving.serving import NAME, asked, image_url, served, slowed


def own(vlm: VisionLanguageModel, scene: int, **options: Any) -> Any:
    """Return the engine's own reply to the same question."""
    return vlm.generate(SCENE_PROMPT, render(sample(scene), 128), **options)


def test_a_reply_is_the_engines(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    expected = own(vlm, 3, max_new_tokens=20)
    found = client.chat.completions.create(
        model=NAME, messages=asked(3), max_tokens=20, temperature=0
    )
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 20
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)


@pytest.mark.parametrize("strategy", ["autoregressive", "prompt-lookup", "early-exit"])
def test_a_stream_is_the_reply_in_pieces(
    client: openai.OpenAI, vlm: VisionLanguageModel, strategy: str
) -> None:
    expected = own(vlm, 4, max_new_tokens=24, temperature=0.7, seed=5)
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=asked(4), max_completion_tokens=24, temperature=0.7, seed=5,
            stream=True, stream_options={"include_usage": True},
            extra_body={"strategy": strategy, "return_drafted": True},
        )
    )  # fmt: skip
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected.text
    assert len(texts) > 4
    drafted = [one for c in chunks if c.choices for one in getattr(c.choices[0], "drafted", [])]
    assert len(drafted) == len(expected.token_ids)
    assert any(drafted) == (strategy == "early-exit" and any(drafted))
    usage = chunks[-1].usage
    assert usage.completion_tokens == 24
    assert usage.completion_tokens_details.accepted_prediction_tokens == sum(drafted)


def test_a_stream_has_an_event_for_each_step(vlm: VisionLanguageModel) -> None:
    network = imitation(vlm.model, exit_layer=2, perfect=True).network
    # Drafts of a fixed length, so that no clock decides.
    network.config.confidence = 0.0
    drafting = VisionLanguageModel(vlm.model, vlm.processor, network)
    expected = own(drafting, 4, max_new_tokens=40)
    assert 1 + expected.statistics.cycles < 20
    with served(drafting) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        numbers = []
        for each_token in (False, True):
            chunks = client.chat.completions.create(
                model=NAME, messages=asked(4), max_tokens=40, temperature=0, stream=True,
                extra_body={"return_drafted": each_token, "num_speculative_tokens": 24},
            )  # fmt: skip
            texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
            assert "".join(texts) == expected.text
            numbers.append(sum(map(bool, texts)))
    together, apart = numbers
    assert together < 20 < apart


def test_a_request_that_bypasses_the_caches(
    client: openai.OpenAI, vlm: VisionLanguageModel
) -> None:
    words: dict[str, Any] = {"model": NAME, "messages": asked(8), "max_tokens": 8, "temperature": 0}
    first, again = (client.chat.completions.create(**words) for _ in range(2))
    kept = len(vlm.lru)
    fresh = client.chat.completions.create(**words, extra_body={"cache": False})
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert fresh.usage.prompt_tokens_details.cached_tokens == 0
    assert len(vlm.lru) == kept
    assert {one.choices[0].message.content for one in (first, again, fresh)} == {
        own(vlm, 8, max_new_tokens=8).text
    }


def test_what_the_cache_has_no_room_for_is_refused() -> None:
    vlm = small_vlm(torch.float32, max_cache_bytes=3 * 64 * 1300)
    with served(vlm) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def reply(tokens: int, **body: Any) -> Any:
            return client.chat.completions.create(
                model=NAME, messages=asked(3), max_tokens=tokens, temperature=0, extra_body=body
            )

        expected = own(vlm, 3, max_new_tokens=8).text
        assert reply(8, priority=-1).choices[0].message.content == expected
        with pytest.raises(openai.BadRequestError, match="bytes of the cache"):
            reply(240)
        with pytest.raises(openai.BadRequestError) as refused:
            reply(8, priority=2**40)
        assert refused.value.param == "priority"
        assert reply(8).choices[0].message.content == expected


def test_several_choices_are_drawn_with_seeds_that_follow(
    client: openai.OpenAI, vlm: VisionLanguageModel
) -> None:
    expected = [own(vlm, 5, max_new_tokens=12, temperature=1.0, seed=7 + i).text for i in range(3)]
    found = client.chat.completions.create(
        model=NAME, messages=asked(5), max_tokens=12, temperature=1, seed=7, n=3
    )
    assert [choice.message.content for choice in found.choices] == expected
    assert found.usage.completion_tokens == 36


def test_log_probabilities(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    expected = own(vlm, 6, max_new_tokens=5, logprobs=2)
    words: dict[str, Any] = {
        "model": NAME, "messages": asked(6), "max_tokens": 5, "temperature": 0, "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**words).choices[0].logprobs.content
    chunks = client.chat.completions.create(**words, stream=True)
    streamed = [
        one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content
    ]
    for found in (whole, streamed):
        assert [one.logprob for one in found] == pytest.approx(
            [one.logprob for one in expected.logprobs]
        )
        assert all(len(one.top_logprobs) == 2 for one in found)


@pytest.mark.parametrize("strategy", ["autoregressive", "early-exit", "prompt-lookup"])
def test_penalties_and_biases(
    client: openai.OpenAI, vlm: VisionLanguageModel, strategy: str
) -> None:
    options: dict[str, Any] = {"presence_penalty": 0.6, "frequency_penalty": 0.4, "temperature": 1}
    expected = [
        own(vlm, 5, max_new_tokens=20, seed=7 + i, logit_bias={9: 2.5, 40: -100}, logprobs=0,
            strategy="autoregressive", **options)
        for i in range(3)
    ]  # fmt: skip
    found = client.chat.completions.create(
        model=NAME, messages=asked(5), max_tokens=20, seed=7, n=3, logprobs=True,
        logit_bias={"9": 2.5, "40": -100}, extra_body={"strategy": strategy}, **options,
    )  # fmt: skip
    assert [choice.message.content for choice in found.choices] == [one.text for one in expected]
    for choice, one in zip(found.choices, expected, strict=True):
        assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
            [token.logprob for token in one.logprobs], abs=1e-4
        )


@pytest.mark.parametrize("strategy", ["autoregressive", "early-exit"])
def test_replies_of_a_form(client: openai.OpenAI, strategy: str) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"number": {"type": "integer"}, "colour": {"enum": ["red", "blue"]}},
        "required": ["number", "colour"],
        "additionalProperties": False,
    }
    words: dict[str, Any] = {
        "model": NAME, "messages": asked(8), "max_tokens": 200, "temperature": 0,
        "extra_body": {"strategy": strategy},
    }  # fmt: skip
    found = client.chat.completions.create(
        **words,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    reply = json.loads(found.choices[0].message.content)
    assert isinstance(reply["number"], int)
    assert reply["colour"] in ("red", "blue")
    words["extra_body"] = {"strategy": strategy, "guided_choice": ["yes", "no"]}
    found = client.chat.completions.create(**words)
    assert found.choices[0].message.content in ("yes", "no")


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        {"guided_regex": "("},
        {"guided_json": {"type": "nothing"}},
        {"guided_json": {"enum": []}},
        {"guided_json": {"type": "integer", "minimum": 5, "maximum": 1}},
        {"guided_json": {"$ref": "http://127.0.0.1:1/schema.json"}},
        {"guided_json": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}},
        {"guided_json": {"const": "x" * 100_000}},
    ],
)
def test_forms_that_make_no_sense(address: str, body: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    started = time.perf_counter()
    found = httpx.post(f"{address}/v1/chat/completions", json={"messages": asked(1), **body})
    assert time.perf_counter() - started < 2, "a machine that is busy has twice the time"
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_many_at_once_are_not_mixed_up(client: openai.OpenAI, vlm: VisionLanguageModel) -> None:
    expected = {seed: own(vlm, seed, max_new_tokens=16).text for seed in range(12)}
    found: dict[int, str] = {}

    def ask(seed: int) -> None:
        reply = client.chat.completions.create(
            model=NAME, messages=asked(seed), max_tokens=16, temperature=0
        )
        found[seed] = reply.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_client_that_goes_away_frees_its_slot(
    client: openai.OpenAI, vlm: VisionLanguageModel
) -> None:
    stream = client.chat.completions.create(
        model=NAME, messages=asked(1), max_tokens=200, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while vlm.engine.slots and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not vlm.engine.slots


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_what_is_far_too_long_is_not_made_into_tokens(address: str, path: str) -> None:
    text = "a " * 500_000
    body = {
        "chat/completions": {"messages": [{"role": "user", "content": text}]},
        "completions": {"prompt": text},
        "responses": {"input": text},
    }[path]

    found = httpx.post(f"{address}/v1/{path}", json=body)
    assert found.status_code == 400
    assert found.json()["error"]["code"] == "context_length_exceeded"
    # What may still fit is, and is refused by its tokens.
    shorter = httpx.post(f"{address}/v1/completions", json={"prompt": "a " * 600})
    assert shorter.status_code == 400
    assert shorter.json()["error"]["code"] is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_k": 3, "nonsense": 1}, "nonsense"),
        ({"temperature": 3}, "temperature"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"05": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, None),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "url": "x"}]}]}, None),
        ({"tools": []}, "tools"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image_url",
                                "image_url": {"url": image_url(1), "detail": "low"},
                            }
                        ],
                    }
                ]
            },
            "messages.0.content",
        ),
        ({"strategy": "guess"}, None),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_in_openais_shape(
    address: str, body: dict[str, Any], param: str | None
) -> None:
    whole = {"model": NAME, "messages": asked(1), **body}
    found = httpx.post(f"{address}/v1/chat/completions", json=whole)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].startswith(param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": ["a", 5]}, "prompt.1"),
        ("completions", {"prompt": [[5, -1]]}, "prompt.0.1"),
        ("chat/completions", {"messages": [{"role": "user", "content": [5]}]},
         "messages.0.content.0"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
         "input.0.content.0.text"),
    ],
)  # fmt: skip
def test_the_field_that_is_wrong_is_named(
    address: str, path: str, body: dict[str, Any], param: str
) -> None:
    found = httpx.post(f"{address}/v1/{path}", json=body)
    assert found.status_code == 400
    assert found.json()["error"]["param"] == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "a red circle"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "Hello."}]}),
        ("responses", {"input": "Hello."}),
    ],
)
def test_an_error_of_the_models_is_told_without_its_message(
    vlm: VisionLanguageModel,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    stream: bool,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a secret of the server's")

    with served(vlm) as address:
        with monkeypatch.context() as patch:
            patch.setattr(vlm.decoder, "forward_layers", fail)
            body = {**body, "stream": stream}
            found = httpx.post(f"{address}/v1/{path}", json=body)
        assert found.status_code == (200 if stream else 500)
        assert "server_error" in found.text
        assert "secret" not in found.text
        # Where the answer has begun, nothing else would tell the operator.
        assert "a secret of the server's" in caplog.text or not stream
        assert not vlm.engine.slots
        assert httpx.post(f"{address}/v1/{path}", json=body).status_code == 200


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest", "file:///etc/passwd", "/etc/passwd",
        "data:image/png;base64,AAAA",        "FILE:///etc/passwd", "ftp://x/y", "",
    ],
)  # fmt: skip
def test_nothing_a_client_names_is_opened(address: str, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": NAME, "messages": [{"role": "user", "content": content}]}
    found = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert found.status_code in (400, 403)
    assert "root:" not in found.text


def test_images_below_a_folder(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    folder, secret = tmp_path / "images", tmp_path / "secret.png"
    folder.mkdir()
    render(sample(2), 128).save(folder / "a b.png")
    render(sample(2), 128).save(secret)
    (folder / "out.png").symlink_to(secret)

    def status(address: str, path: str) -> int:
        content = [{"type": "image_url", "image_url": {"url": f"file://{path}"}}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return httpx.post(f"{address}/v1/chat/completions", json=body).status_code

    with served(vlm, image_folder=folder) as address:
        assert status(address, f"{folder}/a%20b.png") == 200
        for path in (secret, folder / "out.png", folder / ".." / "secret.png", folder / "none.png"):
            assert status(address, str(path)) == 403


def test_keys_bodies_and_names(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with served(vlm, api_key_file=keys, max_body_bytes=2048) as address:
        chat = f"{address}/v1/chat/completions"
        assert httpx.post(chat, json=body).status_code == 401
        wrong = {"Authorization": "Bearer three"}
        assert httpx.post(chat, json=body, headers=wrong).status_code == 401
        right = {"Authorization": "Bearer two"}
        assert httpx.post(chat, json=body, headers=right).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.get(f"{address}/metrics").status_code == 401
        large = {**body, "user": "x" * 5000}
        assert httpx.post(chat, json=large, headers=right).status_code == 413
        # Its length isn't told beforehand.
        chunks = (b"x" * 1000 for _ in range(10))
        assert httpx.post(chat, content=chunks, headers=right).status_code == 413
        other = httpx.post(chat, json={**body, "model": "other"}, headers=right)
        assert other.status_code == 404
        assert other.json()["error"]["code"] == "model_not_found"


def test_a_busy_server_says_so(vlm: VisionLanguageModel) -> None:
    with served(vlm, max_waiting=0) as address, slowed(vlm):
        chat = f"{address}/v1/chat/completions"
        body = {"messages": asked(1), "max_tokens": 200, "ignore_eos": True}
        with httpx.stream("POST", chat, json={**body, "n": 4, "stream": True}) as others:
            lines = others.iter_lines()
            next(lines)
            found = httpx.post(chat, json=body)
        assert found.status_code == 503
        assert int(found.headers["retry-after"]) >= 1
        # More than there is ever room for.
        assert httpx.post(chat, json={**body, "n": 5}).status_code == 400


def test_those_that_begin_take_room(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, planned = threading.Event(), vlm.planned_request

    def later(*words: Any, **options: Any) -> Any:
        go_on.wait(30)
        return planned(*words, **options)

    monkeypatch.setattr(vlm, "planned_request", later)
    body = {"messages": asked(1), "max_tokens": 2, "n": 2}
    with served(vlm, max_waiting=0) as address, ThreadPoolExecutor(8) as threads:
        chat = f"{address}/v1/chat/completions"
        found = [threads.submit(httpx.post, chat, json=body, timeout=60) for _ in range(8)]
        first = [one.result().status_code for one in islice(as_completed(found), 6)]
        go_on.set()
        assert first == [503] * 6
        assert sorted(one.result().status_code for one in found)[:2] == [200] * 2


def test_a_request_ends_in_time(vlm: VisionLanguageModel) -> None:
    with served(vlm, request_seconds=1) as address, slowed(vlm):
        body = {"messages": asked(1), "max_tokens": 200, "n": 4}
        found = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert found.status_code == 408
        found = httpx.post(f"{address}/v1/chat/completions", json={**body, "stream": True})
        last = found.text.strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"
    assert not vlm.engine.slots


def test_models_and_metrics(client: openai.OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    before = metrics(address)
    found = client.chat.completions.create(
        model=NAME, messages=asked(9), max_tokens=8, temperature=0,
        extra_body={"strategy": "early-exit"},
    )  # fmt: skip
    after = metrics(address)

    def grew(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert grew("vllm:generation_tokens_total") == 8
    assert grew("vllm:time_to_first_token_seconds_count") == 1
    assert grew("vllm:inter_token_latency_seconds_count") == 7
    counted = found.usage.completion_tokens_details
    accepted, rejected = counted.accepted_prediction_tokens, counted.rejected_prediction_tokens
    assert grew("vllm:spec_decode_num_accepted_tokens_total") == accepted
    assert grew("vllm:spec_decode_num_draft_tokens_total") == accepted + rejected


def metrics(address: str) -> dict[str, float]:
    """Return the server's metrics, the labels left out."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name.partition("{")[0]: float(value) for name, value in pairs}
