"""JSON schemas that the grammar library would read too widely, and those that nothing ends."""

from __future__ import annotations

import datetime as dt
import re
import threading
import time
from typing import Any

import pytest

from fastvlm import InputError, StructuredOutput, VisionLanguageModel
from fastvlm.decoding import grammar
from fastvlm.decoding.grammar import GrammarCompiler
from fastvlm.decoding.json_schema import FORMATS, for_library, has_finite_reply
from tests.models import small_vlm

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm(prefix_bytes=0)


def accepts(vlm: VisionLanguageModel, schema: Any, text: str) -> bool:
    """Return whether a text is a whole reply of a schema."""
    rule = vlm.builder.grammars.constraint(StructuredOutput("json", schema), vlm.end_tokens)
    assert rule is not None
    tokens = vlm.tokenizer.encode(text, add_special_tokens=False)
    assert vlm.tokenizer.decode(tokens) == text
    mask = rule.allowed(tokens, len(vlm.tokenizer))
    return mask is not None and bool(mask[[*vlm.end_tokens]].any())


def is_date(year: int, month: int, day: int) -> bool:
    try:
        dt.date(year, month, day)
    except ValueError:
        return False
    return True


def test_dates_are_those_of_the_calendar() -> None:
    date = re.compile(FORMATS["date"])
    days = [(y, 2, 29) for y in range(10_000)]
    days += [
        (year, month, day)
        for year in (1, 999, 1900, 2000, 2023, 2024, 9999)
        for month in range(14)
        for day in range(33)
    ]
    for day in days:
        text = "{:04}-{:02}-{:02}".format(*day)
        assert bool(date.search(text)) == is_date(*day), text
    for text in ("24-01-01", "2024-1-1", "2024-01-01 ", "02024-01-01", "2024/01/01"):
        assert not date.search(text)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("23:59:59Z", True), ("08:30:06.283185z", True), ("00:00:00+23:59", True),
        ("23:58:60Z", False), ("24:00:00Z", False), ("12:60:00Z", False), ("12:00:00", False),
        ("12:00:00+24:00", False), ("12:00:00.Z", False), ("12:00Z", False),
    ],
)  # fmt: skip
def test_times_are_those_of_a_clock(text: str, right: bool) -> None:
    assert bool(re.search(FORMATS["time"], text)) == right
    assert bool(re.search(FORMATS["date-time"], f"2024-02-29T{text}")) == right
    assert not re.search(FORMATS["date-time"], f"2023-02-29T{text}")


def test_a_reply_has_no_date_that_there_is_not(vlm: VisionLanguageModel) -> None:
    for schema in (
        {"format": "date"},
        {"type": "string", "format": "date", "pattern": "^20"},
        {"anyOf": [{"$ref": "#/$defs/day"}], "$defs": {"day": {"format": "date"}}},
    ):
        assert accepts(vlm, schema, '"2024-02-29"')
        assert not accepts(vlm, schema, '"2023-02-29"')
    assert not accepts(vlm, {"format": "date", "pattern": "^20"}, '"1999-12-31"')
    assert accepts(vlm, {"format": "date"}, "7"), "a format is for strings"


def test_what_is_no_schema_is_left_alone(vlm: VisionLanguageModel) -> None:
    value = {"format": "date", "extends": 1}
    for schema in (
        {"const": value}, {"enum": [value]}, {"properties": {"format": {"const": "date"}}},
        {"properties": {"extends": {"type": "integer"}}}, {"format": "uuid"},
    ):  # fmt: skip
        assert for_library(schema) == schema
    assert accepts(vlm, {"const": value}, '{"format":"date","extends":1}')
    assert for_library(True) == {}
    assert accepts(vlm, True, "[1,null]")


def link(next_one: Any, **more: Any) -> dict[str, Any]:
    """Return an object that must have a next one."""
    return {"type": "object", "properties": {"next": next_one}, "required": ["next"], **more}


ME = {"$ref": "#"}
SCHEMAS: dict[str, tuple[bool, Any]] = {
    "itself": (False, ME),
    "endless": (False, link(ME)),
    "or nothing": (True, link({"anyOf": [ME, {"type": "null"}]})),
    "or itself": (False, link({"anyOf": [ME, link(ME)]})),
    "not required": (True, link(ME, required=[])),
    "endless lists": (False, {"type": "array", "items": ME, "minItems": 1}),
    "an empty list": (True, {"type": "array", "items": ME}),
    "a list after others": (
        False, {"type": "array", "prefixItems": [{}], "items": ME, "minItems": 2}
    ),
    "only others": (True, {"type": "array", "prefixItems": [{}], "items": ME, "minItems": 1}),
    "first ones": (False, {"type": "array", "items": [ME], "minItems": 1}),
    "any other name": (False, {"type": "object", "additionalProperties": ME, "required": ["a"]}),
    "any type": (True, {"properties": {"next": ME}, "required": ["next"]}),
    "several types": (True, link(ME, type=["object", "null"])),
    "both of two": (False, {"allOf": [link(ME), {"type": "object"}]}),
    "a value": (True, link(ME, const={"next": 1})),
    "in turn": (
        False,
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": link({"$ref": "#/$defs/c%20d"}),
                                           "c d": link({"$ref": "#/$defs/a~1b"})}},
    ),
    "in turn, with an end": (
        True,
        {"$ref": "#/$defs/a", "$defs": {"a": link({"$ref": "#/$defs/b"}),
                                        "b": link({"$ref": "#/$defs/c"}),
                                        "c": {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}},
    ),
    "addresses of its own": (
        True, {"$id": "http://a/b", **link({"$id": "http://c/d", **link(ME)})}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_has_no_end_is_known(name: str, vlm: VisionLanguageModel) -> None:
    finite, schema = SCHEMAS[name]
    assert has_finite_reply(schema) == finite
    if not finite:
        with pytest.raises(InputError, match=r"form|used"):
            vlm.builder.grammars.constraint(StructuredOutput("json", schema), vlm.end_tokens)


def test_a_long_chain_of_references_is_followed_fast() -> None:
    number = 700
    chain = {f"d{i}": link({"$ref": f"#/$defs/d{(i + 1) % number}"}) for i in range(number)}
    started = time.perf_counter()
    assert not has_finite_reply({"$defs": chain, "$ref": "#/$defs/d0"})
    chain[f"d{number - 1}"] = {"type": "null"}
    assert has_finite_reply({"$defs": chain, "$ref": "#/$defs/d0"})
    assert time.perf_counter() - started < 2


def deep(levels: int) -> Any:
    schema: Any = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema", [deep(130), deep(800), {"disallow": "integer"}, {"items": {"divisibleBy": 2}}, False]
)
def test_what_the_library_would_ignore_or_not_read_is_refused(
    schema: Any, vlm: VisionLanguageModel
) -> None:
    with pytest.raises(InputError):
        vlm.builder.grammars.constraint(StructuredOutput("json", schema), vlm.end_tokens)
    assert accepts(vlm, deep(50), "7")


def test_a_long_form_is_refused(vlm: VisionLanguageModel) -> None:
    for form in (
        StructuredOutput("json", {"const": "x" * 70_000}),
        StructuredOutput("regex", "x" * 70_000),
        StructuredOutput("choice", ["x" * 40_000, "y" * 40_000]),
    ):
        with pytest.raises(InputError, match="characters"):
            vlm.builder.grammars.constraint(form, vlm.end_tokens)


def test_what_takes_long_to_compile_is_refused_in_time_and_kept_when_it_is_done(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, compiled = threading.Event(), grammar._compiled
    slow = [StructuredOutput("json", {"const": number}) for number in range(3)]

    def slowly(library: Any, form: StructuredOutput, vocabulary: Any) -> Any:
        if form in slow:
            done.wait()
        return compiled(library, form, vocabulary)

    monkeypatch.setattr(grammar, "_compiled", slowly)
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.2)
    compiler, ends = GrammarCompiler(vlm.tokenizer), vlm.end_tokens
    compiler.constraint(StructuredOutput("regex", "a"), ends)  # it knows the tokenizer now
    for form in slow:
        started = time.perf_counter()
        with pytest.raises(InputError, match=r"compile"):
            compiler.constraint(form, ends)
        assert time.perf_counter() - started < 1
    # What is known already waits for nobody.
    assert compiler.constraint(StructuredOutput("regex", "a"), ends) is not None
    done.set()
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 10)
    for form in slow:
        assert compiler.constraint(form, ends) is not None
