"""A small model whose chat template has tools, as Qwen's, Llama 3's or Mistral's has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from fastvlm import StructuredOutput, VisionLanguageModel
from tests.models import small_vlm

TEXT = (
    "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}{{ '<image>' if part.type == 'image' else part.text }}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
END = "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
QWEN = (
    TEXT + "{%- if tools -%}{{ '<|user|># Tools\\n' }}{%- for tool in tools -%}"
    "{{ tool | tojson }}{{ '\\n' }}{%- endfor -%}"
    "{{ 'Call by <tool_call>\\n{\"name\": <name>}\\n</tool_call>.' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}"
    "{{ '<|user|><answer>' + text(message.content) + '</answer>' }}"
    "{%- else -%}{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}"
    "{{ text(message.content) }}{%- for call in message.tool_calls or [] -%}"
    "{%- if message.content or not loop.first -%}{{ '\\n' }}{%- endif -%}"
    '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{%- endfor -%}"
    "{%- if message.role == 'assistant' -%}<|end|>{%- endif -%}{%- endif -%}{%- endfor -%}" + END
)
LLAMA = (
    TEXT + "{%- for message in messages -%}"
    "{%- if tools and loop.first -%}{{ '<|user|>Answer by JSON: ' + tools | tojson }}{%- endif -%}"
    "{%- if 'tool_calls' in message -%}"
    "{%- if message.tool_calls | length != 1 -%}{{ raise_exception('One call only') }}{%- endif -%}"
    "{%- set call = message.tool_calls[0].function -%}"
    '{{ \'<|assistant|>{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson }}{{ '}<|end|>' }}"
    "{%- else -%}{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}"
    "{{ text(message.content) }}{%- endif -%}{%- endfor -%}" + END
)
MISTRAL = (
    TEXT + "{%- if tools -%}{{ '[AVAILABLE]' + tools | tojson }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.tool_calls is defined -%}{{ '<|assistant|>[TOOL_CALLS] [' }}"
    "{%- for call in message.tool_calls -%}"
    "{%- if call.id | length != 9 -%}{{ raise_exception('Nine characters') }}{%- endif -%}"
    "{{ ', ' if not loop.first }}{{ (call.function | tojson)[:-1] }}"
    "{{ ', \"id\": \"' + call.id + '\"}' }}{%- endfor -%}{{ ']<|end|>' }}"
    "{%- else -%}{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}"
    "{{ text(message.content) }}{%- endif -%}{%- endfor -%}" + END
)
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL}

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"$ref": "#/$defs/place"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["place", "days"],
        "additionalProperties": False,
        "$defs": {"place": {"enum": ["Rome", "Köln", 'a "quote"']}},
    },
}
STOP: dict[str, Any] = {"name": "stop-it"}
TOOLS: list[Any] = [{"type": "function", "function": one} for one in (WEATHER, STOP)]


def calling_vlm(template: str, *, special: bool = False) -> VisionLanguageModel:
    """Return a small random model with a chat template.

    Args:
        template: The name of the template.
        special: Whether `[TOOL_CALLS]` is a special token, as it is Mistral's.
    """
    vlm = small_vlm(torch.float32, max_slots=4)
    # Tools take long prompts.
    vlm.decoder.context = 2048
    vlm.tokenizer.chat_template = TEMPLATES[template]
    if special:
        vlm.tokenizer.add_tokens([AddedToken("[TOOL_CALLS]", special=True, normalized=False)])
        vlm.model.resize_token_embeddings(len(vlm.tokenizer), mean_resizing=False)
    return vlm


@contextmanager
def saying(vlm: VisionLanguageModel, text: str) -> Iterator[None]:
    """Let a model's replies be a text, whatever it is asked."""
    whole = StructuredOutput("choice", [text])
    own = vlm.builder.grammars.constraint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm.builder.grammars, "constraint", lambda _, ends: own(whole, ends))
        yield
