"""Calls are read out of a reply the same however its text is split, and nothing leaks before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fastvlm.serving.tool_readers import Call, CallReader, LeadingReader, Part, TaggedReader

NAMES = {"weather", "find-it"}


def tagged() -> CallReader:
    return TaggedReader("arguments", NAMES, "<tool_call>", "</tool_call>")


def objects() -> CallReader:
    return LeadingReader("parameters", NAMES)


def listed() -> CallReader:
    return LeadingReader("arguments", NAMES, "[TOOL_CALLS]", listed=True)


def body(name: str = "weather", key: str = "arguments", **arguments: Any) -> str:
    """Return a call as JSON."""
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def tag(text: str) -> str:
    """Return a text as Qwen tags a call."""
    return f"<tool_call>\n{text}\n</tool_call>"


def call(name: str = "weather", **arguments: Any) -> Call:
    """Return what is to be read of a call."""
    return Call(name, json.dumps(arguments, ensure_ascii=False))


CALL, FIND = body(city="Köln"), body("find-it")
LLAMA = body(key="parameters", city="Köln")
BROKEN = '{"name": "weather", "arguments": {"city": "Kö'

Case = tuple[Callable[[], CallReader], str, list[Part]]
CASES: dict[str, Case] = {
    "a text": (tagged, "It is <b>warm</b> <tool.", ["It is <b>warm</b> <tool."]),
    "nothing": (tagged, "", []),
    "whitespace": (tagged, " \n", [" \n"]),
    "a call": (tagged, tag(CALL), [call(city="Köln")]),
    "a text before": (tagged, "I look.\n\n" + tag(CALL), ["I look.", call(city="Köln")]),
    "several": (
        tagged,
        f"{tag(CALL)}\n{tag(FIND)}\n{tag(CALL)}\n",
        [call(city="Köln"), call("find-it"), call(city="Köln")],
    ),
    "a text between": (
        tagged,
        f"a {tag(CALL)} b\n{tag(FIND)} c ",
        ["a", call(city="Köln"), " b", call("find-it"), " c"],
    ),
    "no line breaks": (tagged, f"<tool_call>{CALL}</tool_call>", [call(city="Köln")]),
    "tags in a string": (
        tagged,
        tag(body(city='</tool_call> "\\" <tool_call>')),
        [call(city='</tool_call> "\\" <tool_call>')],
    ),
    "other keys": (tagged, tag('{"id": 1, ' + CALL[1:]), [call(city="Köln")]),
    "escaped": (tagged, tag(json.dumps(json.loads(CALL))), [call(city="Köln")]),
    "cut off": (tagged, f"a\n<tool_call>\n{BROKEN}", [f"a\n<tool_call>\n{BROKEN}"]),
    "cut off behind a call": (
        tagged,
        f"{tag(CALL)}\n<tool_call>\n{BROKEN}",
        [call(city="Köln"), f"\n<tool_call>\n{BROKEN}"],
    ),
    "a tag at the end": (tagged, "a <tool_call>", ["a <tool_call>"]),
    "part of a tag at the end": (tagged, f"{tag(CALL)} <tool_", [call(city="Köln"), " <tool_"]),
    "a tag twice": (tagged, f"<tool_call><tool_call>{CALL}</tool_call>",
                    ["<tool_call>", call(city="Köln")]),
    "about tags": (
        tagged,
        f"Use <tool_call> and </tool_call>. {tag(CALL)}",
        ["Use <tool_call> and </tool_call>.", call(city="Köln")],
    ),
    "broken": (
        tagged,
        f"a {tag(CALL[:-1])} {tag(CALL)}",
        [f"a {tag(CALL[:-1])}", call(city="Köln")],
    ),
    "more than an object": (tagged, tag(CALL + "}"), [tag(CALL + "}")]),
    "unknown": (tagged, tag(body("launch")), [tag(body("launch"))]),
    "no arguments": (tagged, tag('{"name": "weather"}'), [tag('{"name": "weather"}')]),
    "arguments as a text": (
        tagged,
        tag('{"name": "weather", "arguments": "{}"}'),
        [tag('{"name": "weather", "arguments": "{}"}')],
    ),
    "a name that is none": (tagged, tag('{"name": ["weather"], "arguments": {}}'),
                            [tag('{"name": ["weather"], "arguments": {}}')]),
    "no number": (
        tagged,
        tag('{"name": "weather", "arguments": {"n": NaN}}'),
        [tag('{"name": "weather", "arguments": {"n": NaN}}')],
    ),
    "too large a number": (
        tagged,
        tag('{"name": "weather", "arguments": {"n": 1e999}}'),
        [tag('{"name": "weather", "arguments": {"n": 1e999}}')],
    ),
    "half a character": (
        tagged,
        tag('{"name": "weather", "arguments": {"n": "\\ud800"}}'),
        [tag('{"name": "weather", "arguments": {"n": "\\ud800"}}')],
    ),
    "Llama's": (objects, LLAMA, [call(city="Köln")]),
    "Llama's, several": (
        objects,
        f" {LLAMA}; {LLAMA};\n",
        [call(city="Köln"), call(city="Köln")],
    ),
    "Llama's, then a text": (objects, f"{LLAMA} Yes.", [call(city="Köln"), " Yes."]),
    "Llama's after a text": (objects, f"I call {LLAMA}", [f"I call {LLAMA}"]),
    "Llama's, cut off": (objects, LLAMA[:-1], [LLAMA[:-1]]),
    "Llama's, another key": (objects, CALL, [CALL]),
    "Llama's, no call": (objects, '{"a": 1} and more', ['{"a": 1} and more']),
    "Llama's, a text": (objects, "\n Hello; {", ["\n Hello; {"]),
    "Mistral's": (
        listed,
        f"[TOOL_CALLS] [{CALL}, {FIND}]",
        [call(city="Köln"), call("find-it")],
    ),
    "Mistral's, its mark a special token": (listed, f"[{CALL}]", [call(city="Köln")]),
    "Mistral's, one unknown": (listed, f"[{CALL}, 1]", [f"[{CALL}, 1]"]),
    "Mistral's, none": (listed, "[TOOL_CALLS][] a", ["[TOOL_CALLS][] a"]),
    "Mistral's mark at the end": (listed, "[TOOL_CA", ["[TOOL_CA"]),
    "Mistral's, a text": (listed, "[1] is a source", ["[1] is a source"]),
}  # fmt: skip


def merged(parts: Iterable[Part]) -> list[Part]:
    """Return parts with all content between two calls in one."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


def read(make: Callable[[], CallReader], pieces: Iterable[str]) -> list[Part]:
    """Return what is read of a text that comes in pieces."""
    reader = make()
    found = [part for piece in pieces for part in reader.feed(piece)]
    return merged([*found, *reader.end()])


@pytest.mark.parametrize("case", CASES)
def test_a_reply_is_read_the_same_however_it_is_split(case: str) -> None:
    make, text, expected = CASES[case]
    assert read(make, [text]) == expected
    assert read(make, text) == expected
    for first in range(len(text)):
        assert read(make, [text[:first], "", text[first:]]) == expected
    for size in (2, 3, 5, 7, 11):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert read(make, pieces) == expected


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_taken_back(case: str) -> None:
    make, text, expected = CASES[case]
    for end in range(len(text)):
        reader = make()
        early = merged(reader.feed(text[:end]))
        if early and isinstance(early[-1], str):
            *before, last = early
            assert before == expected[: len(before)]
            whole = expected[len(before)]
            assert isinstance(whole, str)
            assert whole.startswith(last)
        else:
            assert early == expected[: len(early)]


def test_content_is_not_held_back_for_long() -> None:
    reader = tagged()
    assert reader.feed("a < b") == ["a < b"]
    assert reader.feed(" and <tool") == [" and"]
    assert reader.feed("s") == [" <tools"]
    assert objects().feed("Hello") == ["Hello"]
    assert listed().feed("[TOOLS]") == []  # a list may begin so
    assert listed().feed("Hello") == ["Hello"]


def test_a_call_comes_with_its_last_character() -> None:
    for make, text in ((tagged, tag(CALL)), (objects, LLAMA), (listed, f"[{CALL}]")):
        reader = make()
        assert reader.feed(text[:-1]) == []
        assert reader.feed(text[-1:]) == [call(city="Köln")]


def test_deep_values_are_content() -> None:
    deep = '{"name": "weather", "arguments": ' + '{"a": ' * 100_000
    for make in (tagged, objects, listed):
        text = ("<tool_call>" if make is tagged else "[" * (make is listed)) + deep
        text += "</tool_call>" * (make is tagged)
        assert read(make, [text]) == [text]
