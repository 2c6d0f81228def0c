"""The formats in which models call tools: how a call is recognised, read and asked for."""

from __future__ import annotations

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastvlm.decoding.grammar import WHITESPACE
from fastvlm.decoding.json_schema import for_library, has_finite_reply
from fastvlm.functional.errors import InputError
from fastvlm.functional.messages import Dialogue, Message
from fastvlm.prompts import PromptBuilder
from fastvlm.serving.tool_readers import (
    Call,
    CallReader,
    LeadingReader,
    TaggedReader,
    decoded,
)

Functions = Mapping[str, Mapping[str, Any]]
"""Functions by their names, each with the JSON schema of its arguments."""

PROBE = Call("probe", '{"text": "a call"}')
"""What a chat template is given to see how it writes a call."""
PROBE_ANSWER = "an answer"


@dataclass(frozen=True, slots=True)
class ToolFormat(ABC):
    """How a model calls functions: `{"name": ..., key: {...}}` with something around it.

    Args:
        key: The name of the arguments in a call.
        several: Whether a reply may have several calls.
        mark: What stands before all calls, if anything does.
        mark_token: The mark's token, if it is a special one, which no text shows.
    """

    key: str = "arguments"
    several: bool = True
    mark: str = ""
    mark_token: int | None = None

    @abstractmethod
    def reader(self, names: Collection[str]) -> CallReader:
        """Return a reader of a reply's calls of these functions."""

    @abstractmethod
    def calls(self, several: bool) -> str:
        """Return the Lark rule of one or more calls, each a `call`.

        Args:
            several: Whether there may be more than one.
        """

    @abstractmethod
    def free(self, several: bool) -> str:
        """Return the Lark rules of a reply with or without calls.

        Args:
            several: Whether there may be more than one.
        """

    def call_id(self) -> str:
        """Return a new name of a call."""
        return f"call_{secrets.token_hex(12)}"

    def grammar(self, functions: Functions, *, several: bool, required: bool) -> str:
        """Return a grammar, in Lark's notation, of replies whose calls are valid.

        Args:
            functions: The functions that may be called.
            several: Whether a reply may have more than one call.
            required: Whether a reply is calls and nothing else; else it may also be a text.

        Raises:
            InputError: A function's arguments can't be of its schema.
        """
        several = several and self.several
        rules = [
            f"start: {self.calls(several)}" if required else self.free(several),
            f"call: {' | '.join(f'call_{number}' for number in range(len(functions)))}",
        ]
        for number, (name, schema) in enumerate(functions.items()):
            beginning = quoted(f'{{"name": "{name}", "{self.key}": ')
            # As `StructuredOutput` has JSON.
            settings = {"whitespace_pattern": WHITESPACE, "lenient": False}
            known = for_library({"type": "object", **schema})
            if not has_finite_reply(known):
                raise InputError(f"No call of {name} has arguments of its schema.")
            arguments = json.dumps({**known, "x-guidance": settings})
            rules += [
                f'call_{number}: {beginning} arguments_{number} "}}"',
                f"arguments_{number}: %json {arguments}",
            ]
        return "\n".join(rules)


@dataclass(frozen=True, slots=True)
class TaggedFormat(ToolFormat):
    """Calls between tags, as Qwen and Hermes write them.

    Args:
        opening: The tag before a call.
        closing: The tag behind it.
    """

    opening: str = "<tool_call>"
    closing: str = "</tool_call>"

    def reader(self, names: Collection[str]) -> CallReader:
        """Return a reader. See `ToolFormat`."""
        return TaggedReader(self.key, names, self.opening, self.closing)

    def calls(self, several: bool) -> str:
        """Return the rule of calls. See `ToolFormat`."""
        one = f"{quoted(self.opening)} {self._inside}"
        return one if not several else f"{one} ({quoted(chr(10) + self.opening)} {self._inside})*"

    def free(self, several: bool) -> str:
        """Return the rules of any reply. See `ToolFormat`."""
        return "\n".join(
            [
                "start: part* TEXT" if several else "start: part | TEXT",
                f"part: begun {self._inside}",
                f"begun[lazy]: TEXT {quoted(self.opening)}",
                r"TEXT: /(.|\n)*/",
            ]
        )

    @property
    def _inside(self) -> str:
        """What follows an opening tag."""
        return rf'"\n" call {quoted(chr(10) + self.closing)}'


@dataclass(frozen=True, slots=True)
class LeadingFormat(ToolFormat):
    """Calls as plain JSON, which a reply begins with, as Llama 3 and Mistral write them.

    Args:
        listed: Whether the calls are a list.
    """

    listed: bool = False

    def reader(self, names: Collection[str]) -> CallReader:
        """Return a reader. See `ToolFormat`."""
        return LeadingReader(self.key, names, self.mark, listed=self.listed)

    def calls(self, several: bool) -> str:
        """Return the rule of calls. See `ToolFormat`."""
        between = quoted(", " if self.listed else "; ")
        many = f"call ({between} call)*" if several else "call"
        mark = f"<[{self.mark_token}]>" if self.mark_token is not None else quoted(self.mark)
        return f'{mark} "[" {many} "]"' if self.listed else many

    def free(self, several: bool) -> str:
        """Return the rules of any reply. See `ToolFormat`."""
        start = r"\[" if self.listed else r"\{"
        return "\n".join(
            [
                f"start: calls | TEXT\ncalls: {self.calls(several)}",
                rf"TEXT: /(\s*[^\s{start}](.|\n)*)?/",
            ]
        )

    def call_id(self) -> str:
        """Return a new name of a call; Mistral's templates take nine letters and digits alone."""
        if not self.listed:
            # A dataclass with slots is made anew, which `super()` does not know.
            return ToolFormat.call_id(self)
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


FORMATS: Sequence[ToolFormat] = (
    TaggedFormat(),
    LeadingFormat(key="parameters", several=False),
    LeadingFormat(mark="[TOOL_CALLS]", listed=True),
)
"""The formats of Qwen and Hermes, of Llama 3, and of Mistral."""


def tool_format(prompts: PromptBuilder, tokenizer: PreTrainedTokenizerBase) -> ToolFormat | None:
    """Return the format of a model's calls: the one in which its chat template writes an example.

    Args:
        prompts: The model's prompts.
        tokenizer: Its tokenizer, which leaves special tokens out of replies.

    Returns:
        The format; None for one that isn't known, or a template that shows no calls or answers.
    """
    # Templates may spell out a schema, and take for granted that all of it is described.
    text = {"type": "string", "description": "A text."}
    parameters = {"type": "object", "properties": {"text": text}, "required": ["text"]}
    function = {"name": PROBE.name, "description": "A probe.", "parameters": parameters}
    called = {"name": PROBE.name, "arguments": json.loads(PROBE.arguments)}
    # The only name of a call that all templates take.
    name = "probe0001"
    turns: list[Message] = [
        {"role": "user", "content": "A question."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": name, "type": "function", "function": called}],
        },
        {"role": "tool", "tool_call_id": name, "name": PROBE.name, "content": PROBE_ANSWER},
    ]
    tools = [{"type": "function", "function": function}]
    try:
        before, whole = (prompts.rendered(Dialogue(some, tools)) for some in (turns[:1], turns))
    except InputError:
        return None
    if PROBE_ANSWER not in whole:
        return None
    tokens: Any = tokenizer
    reply = tokens.encode(whole.removeprefix(before), add_special_tokens=False)
    shown = tokens.decode(reply, skip_special_tokens=True)
    for one in FORMATS:
        reader = one.reader({PROBE.name})
        calls = [part for part in reader.feed(shown) if isinstance(part, Call)]
        known = any(decoded(call.arguments)[0] == called["arguments"] for call in calls)
        if known and not reader.broken:
            special = {
                known.content for known in tokens.added_tokens_decoder.values() if known.special
            }
            token = tokens.convert_tokens_to_ids(one.mark) if one.mark in special else None
            return replace(one, mark_token=token)
    return None


def quoted(text: str) -> str:
    """Return a text as a string of Lark."""
    return json.dumps(text)
