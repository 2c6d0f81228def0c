"""Calls are read out of a reply the same however its text is split; nothing is taken back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fastvlm.serving.tool_readers import (
    Call,
    CallReader,
    LeadingReader,
    MoreArguments,
    Part,
    TaggedReader,
)

NAMES = {"weather", "find-it"}
Case = tuple[Callable[[], CallReader], str, list[Part]]


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


def written(arguments: str) -> Case:
    """Return the case of a tagged call with arguments as they are written."""
    text = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
    return tagged, text, [Call("weather", arguments)]


CALL, FIND = body(city="Köln"), body("find-it")
LLAMA = body(key="parameters", city="Köln")
BROKEN = '{"name": "weather", "arguments": {"city": "Kö'

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
    "the arguments first": (
        tagged,
        tag('{"arguments": {"city": "Köln"}, "name": "weather"}'),
        [call(city="Köln")],
    ),
    "keys behind": (
        tagged,
        tag(CALL[:-1] + ', "id": "</tool_call>"}') + " a",
        [call(city="Köln"), " a"],
    ),
    "keys behind, cut off": (
        tagged,
        f'<tool_call>{CALL[:-1]}, "id": 1',
        [call(city="Köln"), ', "id": 1'],
    ),
    "cut off": (tagged, f"a\n<tool_call>\n{BROKEN}", ["a", Call("weather", '{"city": "Kö')]),
    "cut off behind a call": (
        tagged,
        f"{tag(CALL)}\n<tool_call>\n{BROKEN}",
        [call(city="Köln"), Call("weather", '{"city": "Kö')],
    ),
    "cut off in the name": (tagged, 'a <tool_call>\n{"name": "we', ['a <tool_call>\n{"name": "we']),
    "cut off before the arguments": (
        tagged,
        'a <tool_call>\n{"name": "weather", "arguments": ',
        ['a <tool_call>\n{"name": "weather", "arguments": '],
    ),
    "cut off behind the arguments": (tagged, f"<tool_call>\n{CALL[:-1]}", [call(city="Köln")]),
    "cut off in the last tag": (tagged, tag(CALL)[:-3], [call(city="Köln")]),
    "no closing tag": (tagged, f"<tool_call>{CALL} Done.", [call(city="Köln"), " Done."]),
    "braces": written('{"a": {"b": {}}, "c": "}", "d": [{}]}'),
    "escapes": written('{"a": "\\\\", "b": "\\"}", "c": "\\u00f6\\ud800"}'),
    "spaces": written('{ "a" :1\n}'),
    "no number": written('{"n": NaN}'),
    "too large a number": written('{"n": 1e999}'),
    "no key": written("{Köln}"),
    "an open string": (
        tagged,
        f'{tag(CALL[:-3] + "}")} a',
        [Call("weather", '{"city": "Köln}\n</tool_call> a')],
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
        f"a {tag(CALL[:-2])} {tag(CALL)}",
        ["a", Call("weather", '{"city": "Köln"\n'), call(city="Köln")],
    ),
    "one brace too few": (tagged, tag(CALL[:-1]), [call(city="Köln")]),
    "more than an object": (tagged, tag(CALL + "}"), [call(city="Köln"), "}\n</tool_call>"]),
    "unknown": (tagged, tag(body("launch")), [tag(body("launch"))]),
    "no arguments": (tagged, tag('{"name": "weather"}'), [tag('{"name": "weather"}')]),
    "arguments as a text": (
        tagged,
        tag('{"name": "weather", "arguments": "{}"}'),
        [tag('{"name": "weather", "arguments": "{}"}')],
    ),
    "a name that is none": (tagged, tag('{"name": ["weather"], "arguments": {}}'),
                            [tag('{"name": ["weather"], "arguments": {}}')]),
    "half a character behind": (
        tagged,
        tag('{"arguments": {"n": "\\ud800"}, "name": "weather"}'),
        [tag('{"arguments": {"n": "\\ud800"}, "name": "weather"}')],
    ),
    "no number behind": (
        tagged,
        tag('{"arguments": {"n": NaN}, "name": "weather"}'),
        [tag('{"arguments": {"n": NaN}, "name": "weather"}')],
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
    """Return parts with all content between two calls in one, and each call whole."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, str) and isinstance(last, str):
            found[-1] = last + part
        elif isinstance(part, MoreArguments):
            assert isinstance(last, Call)
            found[-1] = Call(last.name, last.arguments + part.text)
        else:
            found.append(part)
    return found


def shown(part: Part) -> tuple[str | None, str]:
    """Return the function that a part calls, None for content, and its text."""
    return (part.name, part.arguments) if isinstance(part, Call) else (None, str(part))


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
        assert early[:-1] == expected[: len(early[:-1])]
        if early:
            (kind, last), (known, whole) = map(shown, (early[-1], expected[len(early) - 1]))
            assert kind == known
            assert whole.startswith(last)


def test_content_is_not_held_back_for_long() -> None:
    reader = tagged()
    assert reader.feed("a < b") == ["a < b"]
    assert reader.feed(" and <tool") == [" and"]
    assert reader.feed("s") == [" <tools"]
    assert objects().feed("Hello") == ["Hello"]
    assert listed().feed("[TOOLS]") == []  # a list may begin so
    assert listed().feed("Hello") == ["Hello"]


def test_a_tagged_call_comes_as_it_is_written() -> None:
    reader = tagged()
    assert reader.feed('a\n<tool_call>\n{"name": "weather", "arguments": ') == ["a"]
    assert reader.feed('{"ci') == [Call("weather", '{"ci')]
    assert reader.feed('ty": "</tool') == [MoreArguments('ty": "</tool')]
    assert reader.feed('"}') == [MoreArguments('"}')]
    assert reader.feed("}\n</tool_call>") == []
    assert reader.feed(tag(FIND)) == [call("find-it")]


def test_other_calls_come_with_their_last_character() -> None:
    first = '<tool_call>{"arguments": {"city": "Köln"}, "name": "weather"}</tool_call>'
    for make, text in ((tagged, first), (objects, LLAMA), (listed, f"[{CALL}]")):
        reader = make()
        assert reader.feed(text[:-1]) == []
        assert reader.feed(text[-1:]) == [call(city="Köln")]


def test_deep_values() -> None:
    deep = '{"a": ' * 100_000
    assert read(tagged, [f'<tool_call>{{"name": "weather", "arguments": {deep}</tool_call>']) == [
        Call("weather", deep)
    ]
    for make in (objects, listed):
        text = "[" * (make is listed) + '{"name": "weather", "arguments": ' + deep
        assert read(make, [text]) == [text]
