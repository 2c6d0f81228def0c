"""Prompts with tools are those of transformers' own chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastvlm
from fastvlm import Dialogue, InputError
from tests.families import FAMILIES, replies
from tests.models import small_vlm
from tests.processors import TEXT_TEMPLATE, character_tokenizer, saved
from tests.processors import sample_image as image

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
    }
]
SHOWN = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLED = "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
ANSWERED: list[dict[str, Any]] = [
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "A cup."},
]


def test_a_processors_template_shows_tools(tmp_path: Path) -> None:
    model, processor = saved("llava", tmp_path)
    processor.chat_template = SHOWN + CALLED + processor.chat_template
    processor.save_pretrained(tmp_path)
    vlm = fastvlm.load(tmp_path, dtype=model.dtype)
    user = [{"type": "image", "image": image(1)}, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "A cup."}]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": user},
        {**ANSWERED[1], "content": []},
        {**ANSWERED[2], "content": answer},
    ]
    expected = processor.apply_chat_template(
        turns, tools=TOOLS, add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    dialogue = Dialogue(turns, TOOLS)
    found = vlm.generate(dialogue, max_new_tokens=9)
    assert found.prompt_token_ids == expected["input_ids"][0].tolist()
    assert [found.token_ids] == replies(vlm.model, dict(expected.to(vlm.model.dtype)), 9)
    inputs = vlm.prompts.inputs(dialogue)
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    # What was computed without tools is not taken for what is.
    plain = vlm.generate(turns, max_new_tokens=9)
    assert len(plain.prompt_token_ids) < len(found.prompt_token_ids)
    assert vlm.generate(dialogue, max_new_tokens=9).token_ids == found.token_ids


def test_a_tokenizers_template_shows_tools(tmp_path: Path) -> None:
    model, _ = FAMILIES["llama"]()
    tokenizer = character_tokenizer()
    for number, template in enumerate((SHOWN + CALLED + TEXT_TEMPLATE, TEXT_TEMPLATE, None)):
        tokenizer.chat_template = template
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        vlm = fastvlm.load(folder, dtype=model.dtype)
        if template is None or not template.startswith(SHOWN):
            with pytest.raises(InputError, match="tools"):
                vlm.generate(Dialogue(ANSWERED[:1], TOOLS))
            continue
        expected = tokenizer.apply_chat_template(
            ANSWERED, tools=TOOLS, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        found = vlm.generate(Dialogue(ANSWERED, TOOLS), max_new_tokens=9)
        assert found.prompt_token_ids == expected["input_ids"][0].tolist()
        assert [found.token_ids] == replies(model, expected, 9)


@pytest.mark.parametrize("shown", [False, True])
def test_fastvithds_template_shows_tools(shown: bool) -> None:
    vlm = small_vlm()
    vlm.tokenizer.chat_template = (SHOWN if shown else "") + vlm.tokenizer.chat_template
    dialogue = Dialogue(ANSWERED[:1], TOOLS)
    if not shown:
        with pytest.raises(InputError, match="shows no tools"):
            vlm.generate(dialogue)
        return
    expected = vlm.tokenizer.apply_chat_template(
        ANSWERED[:1], tools=TOOLS, add_generation_prompt=True, tokenize=False
    )
    assert vlm.prompts.rendered(dialogue) == expected
    found = vlm.generate(dialogue, max_new_tokens=2)
    assert found.prompt_token_ids == vlm.tokenizer.encode(expected)


def test_a_template_that_always_needs_tools() -> None:
    vlm = small_vlm()
    vlm.tokenizer.chat_template = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + (
        vlm.tokenizer.chat_template
    )
    assert "look" in vlm.prompts.rendered(Dialogue(ANSWERED[:1], TOOLS))
