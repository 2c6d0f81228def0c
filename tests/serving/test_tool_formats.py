"""Formats are known by the chat template, and grammars take valid calls and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastvlm import StructuredOutput, VisionLanguageModel
from fastvlm.serving.protocol import ChatRequest
from fastvlm.serving.tool_formats import LeadingFormat, TaggedFormat, ToolFormat, tool_format
from fastvlm.serving.tools import ToolUse
from tests.serving.calling import LLAMA, MISTRAL, QWEN, WEATHER, calling_vlm

pytest.importorskip("llguidance")

OPEN: dict[str, Any] = {"name": "open", "parameters": {"properties": {"n": {"type": "integer"}}}}
FUNCTIONS = {one["name"]: one["parameters"] for one in (WEATHER, OPEN)}


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return calling_vlm("qwen")


def accepts(vlm: VisionLanguageModel, form: StructuredOutput | None, text: str) -> bool:
    """Return whether a reply of a form may be a text."""
    assert form is not None
    tokens = vlm.tokenizer.encode(text)
    rule = vlm.builder.grammars.constraint(form, vlm.end_tokens)
    assert rule is not None
    mask = rule.allowed(tokens, len(vlm.tokenizer))
    return mask is not None and bool(mask[[*vlm.end_tokens]].all())


def written(name: str, arguments: Any, key: str = "arguments") -> str:
    """Return a call as JSON."""
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


ROME = {"place": "Rome", "days": 3}
VALID = [("weather", ROME), ("open", {}), ("open", {"n": 1, "more": [None]})]
INVALID: list[tuple[str, Any]] = [
    ("weather", {"place": "Rome"}),
    ("weather", {**ROME, "days": 0}),
    ("weather", {**ROME, "more": 1}),
    ("open", {"n": "1"}),
    ("open", []),
    ("close", {}),
]


def replies(form: ToolFormat, calls: list[tuple[str, Any]]) -> str:
    """Return a reply of calls."""
    bodies = [written(name, arguments, form.key) for name, arguments in calls]
    if isinstance(form, TaggedFormat):
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in bodies)
    assert isinstance(form, LeadingFormat)
    return f"[TOOL_CALLS][{', '.join(bodies)}]" if form.listed else "; ".join(bodies)


@pytest.mark.parametrize("template", ["qwen", "llama", "mistral"])
def test_required_calls(vlm: VisionLanguageModel, template: str) -> None:
    other = calling_vlm(template)
    form = tool_format(other.prompts, other.tokenizer)
    assert form is not None
    for several in (True, False):
        grammar = form.grammar(FUNCTIONS, several=several, required=True)
        asked = StructuredOutput("grammar", grammar)
        for one in VALID:
            assert accepts(vlm, asked, replies(form, [one]))
            twice = replies(form, [one, VALID[0]])
            assert accepts(vlm, asked, twice) == (several and template != "llama")
            assert not accepts(vlm, asked, "a" + replies(form, [one]))
            assert not accepts(vlm, asked, replies(form, [one]) + "a")
        for one in INVALID:
            assert not accepts(vlm, asked, replies(form, [one]))
        for text in ("", "a text", replies(form, [VALID[0]])[:-1]):
            assert not accepts(vlm, asked, text)


@pytest.mark.parametrize("template", ["qwen", "llama", "mistral"])
@pytest.mark.parametrize("several", [True, False])
def test_calls_of_the_models_own_accord(
    vlm: VisionLanguageModel, template: str, several: bool
) -> None:
    other = calling_vlm(template)
    form = tool_format(other.prompts, other.tokenizer)
    assert form is not None
    grammar = form.grammar(FUNCTIONS, several=several, required=False)
    asked = StructuredOutput("grammar", grammar)
    for text in ("", "a text", "\nüber {", "a <tool_ and <b>"):
        assert accepts(vlm, asked, text)
    for one in VALID:
        assert accepts(vlm, asked, replies(form, [one]))
    for one in INVALID:
        assert not accepts(vlm, asked, replies(form, [one]))
    if template == "qwen":
        call = replies(form, [VALID[0]])
        assert accepts(vlm, asked, f"I look.\n{call}")
        assert not accepts(vlm, asked, f"I look.\n{replies(form, [INVALID[0]])}")
        assert accepts(vlm, asked, f"{call}\n{call}\nDone.") == several
        assert not accepts(vlm, asked, "<tool_call> a")


UNKNOWN = {
    "marked arguments": QWEN.replace("{{ '}\\n</tool_call>' }}", "{{ '</arg>\\n</tool_call>' }}"),
    "another key": QWEN.replace('"arguments": ', '"args": '),
    "calls that aren't shown": QWEN.replace("message.tool_calls or []", "[]"),
    "answers that aren't shown": QWEN.replace("text(message.content) + '</answer>'", "'?'"),
    "other tags": QWEN.replace("tool_call>", "call>"),
    "a call's name": LLAMA.replace("call.name", "call.name | upper"),
    "another mark": MISTRAL.replace("[TOOL_CALLS]", "[CALLS]"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_other_formats_are_unknown(vlm: VisionLanguageModel, case: str) -> None:
    template = vlm.tokenizer.chat_template
    assert UNKNOWN[case] not in (QWEN, LLAMA, MISTRAL)
    vlm.tokenizer.chat_template = UNKNOWN[case]
    try:
        assert tool_format(vlm.prompts, vlm.tokenizer) is None
    finally:
        vlm.tokenizer.chat_template = template


def test_hidden_tags_are_unknown() -> None:
    vlm = calling_vlm("qwen")
    vlm.tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    assert tool_format(vlm.prompts, vlm.tokenizer) is None


def use(vlm: VisionLanguageModel, strict: bool | None = None, **fields: Any) -> ToolUse:
    """Return the tools of a request with two functions, of which the first may be strict."""
    functions = [WEATHER | ({} if strict is None else {"strict": strict}), OPEN]
    tools = [{"type": "function", "function": one} for one in functions]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools, **fields}
    return ToolUse.of(ChatRequest.model_validate(body).asked_tools(), vlm)


def test_what_holds_a_reply(vlm: VisionLanguageModel) -> None:
    call, broken = (
        f"<tool_call>\n{written(name, arguments)}\n</tool_call>"
        for name, arguments in (VALID[0], INVALID[0])
    )
    other = f"<tool_call>\n{written('open', {'n': 'x'})}\n</tool_call>"
    # Nothing, where nothing asks for it.
    for fields in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"strict": False}):
        assert use(vlm, **fields).structured is None
    # Strict functions have their schema, and the others any arguments.
    strict = use(vlm, strict=True).structured
    assert [accepts(vlm, strict, one) for one in ("a", call, broken, other, f"{call}{call}")] == [
        True, True, False, True, True,
    ]  # fmt: skip
    single = use(vlm, parallel_tool_calls=False).structured
    assert [accepts(vlm, single, one) for one in ("a", call, broken, f"{call}\n{call}")] == [
        True, True, True, False,
    ]  # fmt: skip
    named = use(vlm, tool_choice={"type": "function", "function": {"name": "open"}}).structured
    valid = f"<tool_call>\n{written('open', {'n': 1})}\n</tool_call>"
    texts = ("a", call, other, f"{valid}\n{valid}", valid)
    assert [accepts(vlm, named, one) for one in texts] == [False, False, False, False, True]


def test_what_the_model_is_shown(vlm: VisionLanguageModel) -> None:
    shown = use(vlm, strict=True).shown([{"role": "user", "content": "a"}])
    # As the client gave them, but for what is the server's matter.
    functions = [{"type": "function", "function": one} for one in (WEATHER, OPEN)]
    lines = vlm.prompts.rendered(shown).splitlines()
    assert [json.loads(one) for one in lines if one.startswith('{"type"')] == functions
