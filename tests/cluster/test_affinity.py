"""Which requests meet on a replica, and how little changes when one comes or goes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from fastvlm.cluster.affinity import affinity_key, ranked

A, B = "data:image/png;base64,QQ==", "data:image/png;base64,Qg=="


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def key(**body: Any) -> str:
    return affinity_key(json.dumps(body).encode())


def test_questions_about_an_image_meet() -> None:
    first = key(messages=[user(shown(A), said("What is it?"))])
    system = {"role": "system", "content": "Be brief."}
    assert first
    assert key(messages=[system, user(said("And this?"), shown(A))], stream=True) == first
    assert key(messages=[user(shown(A)), {"role": "assistant", "content": "A cat."},
                         user(shown(B), said("And this?"))]) == first  # fmt: skip
    assert key(input=[user({"type": "input_image", "image_url": A})]) == first
    assert key(messages=[user(shown(B), said("What is it?"))]) != first


def test_turns_of_a_conversation_meet() -> None:
    opening = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    first = key(messages=opening)
    later = [
        *opening,
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye."},
    ]
    assert first
    assert key(messages=later, temperature=1) == first
    assert key(messages=[{"role": "user", "content": "Hi."}]) != first
    assert key(prompt="Once upon a time") == key(prompt="Once upon a time", max_tokens=3) != ""
    assert key(prompt=[1, 2, 3]) != key(prompt=[1, 2, 4])
    assert key(input="Hello.") != ""


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b"[" * 100_000, b'{"messages": 3}',
     b'{"messages": []}', b'{"prompt": null}', b'{"input": {}}'],
)  # fmt: skip
def test_bodies_without_a_key(body: bytes) -> None:
    assert affinity_key(body) == ""


@pytest.mark.parametrize(
    "turns",
    [[3], [None], [{"content": 4}], [{"content": [5, {"image_url": 6}, {"image_url": {}}]}]],
)
def test_odd_bodies_have_a_key(turns: Any) -> None:
    assert key(messages=turns)


def test_keys_are_spread_and_few_of_them_move() -> None:
    replicas = [f"replica {number}" for number in range(10)]
    keys = [f"key {number}" for number in range(5000)]
    before = {one: ranked(one, replicas) for one in keys}
    shares = Counter(order[0] for order in before.values())
    assert len(shares) == 10
    assert all(400 < share < 600 for share in shares.values())
    for one in keys:
        after = ranked(one, reversed(replicas[1:]))
        assert after == [replica for replica in before[one] if replica != replicas[0]]
        more = ranked(one, [*replicas, "new"])
        assert [replica for replica in more if replica != "new"] == before[one]
