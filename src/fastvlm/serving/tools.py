"""Tools in a dialogue: what the model is shown of them, and its calls in the reply."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types.chat import ChatCompletionMessage

from fastvlm.decoding.structured import StructuredOutput
from fastvlm.functional.errors import InputError, first_line
from fastvlm.functional.messages import Dialogue, Message
from fastvlm.serving.errors import ApiError
from fastvlm.serving.protocol import ChatMessage
from fastvlm.serving.tool_formats import ToolFormat, tool_format
from fastvlm.serving.tool_protocol import AskedTools, Function
from fastvlm.serving.tool_readers import Call, CallReader, Part, PlainReader
from fastvlm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request.

    Args:
        functions: The functions that the model is shown; none for none.
        form: The format of its calls; None without functions.
        structured: What the reply is to look like because of them; None for anything.
    """

    functions: Sequence[Function] = ()
    form: ToolFormat | None = None
    structured: StructuredOutput | None = None

    @classmethod
    def of(cls, asked: AskedTools, vlm: VisionLanguageModel) -> ToolUse:
        """Return the tools of a request.

        Raises:
            ApiError: The model has no tools, or not in a format that is known; or fields of the
                request contradict each other.
        """
        check_tools(asked)
        if not asked.shown and not asked.called:
            return cls()
        form = tool_format(vlm.prompts, vlm.tokenizer)
        if form is None:
            raise ApiError(
                "The chat template of this model has no tools in a format that is known here"
                " (Qwen's and Hermes', Llama 3's, or Mistral's).",
                param="tools" if asked.shown else asked.dialogue,
            )
        if not asked.shown:
            return cls()
        try:
            structured = constrained(asked, form)
            vlm.builder.grammars.constraint(structured, vlm.end_tokens)
        except InputError as error:
            raise ApiError(
                f"No call can be held to these tools: {first_line(error)}.", param="tools"
            ) from error
        return cls(asked.functions, form, structured)

    def shown(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return a dialogue with the tools, as the chat template takes them."""
        if not self.functions:
            return messages
        # Whether a call is strict is the server's matter.
        fields = {"name", "description", "parameters"}
        return Dialogue(
            messages,
            [
                {
                    "type": "function",
                    "function": one.model_dump(include=fields, exclude_unset=True),
                }
                for one in self.functions
            ],
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options of a reply that they ask for."""
        return {} if self.structured is None else {"structured": self.structured}

    def reader(self) -> CallReader | PlainReader:
        """Return a reader of a reply's content and calls."""
        if self.form is None:
            return PlainReader()
        return self.form.reader({one.name for one in self.functions})

    def call_id(self) -> str:
        """Return a new name of a call."""
        assert self.form is not None  # without tools no calls are read
        return self.form.call_id()


class ReplyMessage:
    """The message of one reply, whose text comes piece by piece.

    Args:
        tools: What the model may call.
    """

    def __init__(self, tools: ToolUse) -> None:
        self.tools, self.reader = tools, tools.reader()
        self.content = ""
        self.calls: list[dict[str, Any]] = []

    def feed(self, text: str) -> dict[str, Any]:
        """Return the delta that new text makes, as OpenAI has it."""
        return self._delta(self.reader.feed(text))

    def end(self) -> dict[str, Any]:
        """Return the delta of what was held back, as no more text will come."""
        return self._delta(self.reader.end())

    def whole(self, text: str) -> ChatCompletionMessage:
        """Return the message that a whole reply is."""
        self.feed(text)
        self.end()
        if not self.calls:
            return ChatCompletionMessage(role="assistant", content=self.content)
        return ChatCompletionMessage.model_validate(
            {"role": "assistant", "content": self.content or None, "tool_calls": self.calls}
        )

    def finish_reason(self, reason: Any) -> Any:
        """Return why the reply has ended, as OpenAI has it, from what it is without tools."""
        return "tool_calls" if self.calls and reason == "stop" else reason

    def _delta(self, parts: Sequence[Part]) -> dict[str, Any]:
        content = ""
        changed: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                content += part
            elif isinstance(part, Call):
                function = {"name": part.name, "arguments": part.arguments}
                call = {"id": self.tools.call_id(), "type": "function", "function": function}
                changed.append({"index": len(self.calls), **copy.deepcopy(call)})
                self.calls.append(call)
            else:
                self.calls[-1]["function"]["arguments"] += part.text
                more = {"arguments": part.text}
                changed.append({"index": len(self.calls) - 1, "function": more})
        self.content += content
        found: dict[str, Any] = {"content": content} if content else {}
        return found | ({"tool_calls": changed} if changed else {})


def check_tools(asked: AskedTools) -> None:
    """Refuse fields on tools that contradict each other.

    Raises:
        ApiError: They do.
    """
    names = [one.name for one in asked.functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ApiError(f"There are several tools with the name {twice!r}.", param="tools")
    if asked.named is not None and asked.named not in names:
        raise ApiError(f"There is no tool {asked.named!r}.", param="tool_choice")
    if asked.shown and asked.form is not None:
        raise ApiError(
            "A reply that may call tools has no other form; set tool_choice to none, or leave the"
            " form out.",
            param="tools",
        )


def constrained(asked: AskedTools, form: ToolFormat) -> StructuredOutput | None:
    """Return what a reply is to look like; None for anything.

    Args:
        asked: What the request says of tools.
        form: The format of the model's calls.
    """
    required = asked.choice == "required"
    if not required and asked.several and not any(one.strict for one in asked.functions):
        return None
    grammar = form.grammar(
        {
            one.name: schema(one, required=required)
            for one in asked.functions
            if asked.named in (None, one.name)
        },
        several=asked.several and asked.named is None,
        required=required,
    )
    return StructuredOutput("grammar", grammar)


def schema(function: Function, *, required: bool) -> Mapping[str, Any]:
    """Return the JSON schema that the arguments of a call are held to.

    Args:
        function: The function.
        required: Whether calls are required; else only strict functions have their schema.
    """
    if not required and not function.strict:
        return {}
    if function.parameters is None:
        return {"properties": {}, "additionalProperties": False}
    return function.parameters


def tool_fields(asked: Sequence[ChatMessage], field: str) -> list[dict[str, Any]]:
    """Return what each turn of a dialogue has of names, calls and answers, as templates take it.

    Args:
        asked: The dialogue.
        field: The field of the request that it comes from.

    Raises:
        ApiError: An answer is to no call, or a field isn't for the role.
    """
    names: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    for turn, message in enumerate(asked):
        param = f"{field}.{turn}"
        if message.tool_calls and message.role != "assistant":
            raise ApiError("Only the assistant calls tools.", param=f"{param}.tool_calls")
        if (message.tool_call_id is not None) != (message.role == "tool"):
            raise ApiError(
                "A message of the role tool, and no other, has a tool_call_id.",
                param=f"{param}.tool_call_id",
            )
        if message.content is None and not message.tool_calls:
            raise ApiError("The message has no content.", param=f"{param}.content")
        fields: dict[str, Any] = {} if message.name is None else {"name": message.name}
        if message.tool_calls:
            fields["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": json.loads(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
            names |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                raise ApiError(
                    f"No call before it has the id {message.tool_call_id!r}.",
                    param=f"{param}.{'call_id' if field == 'input' else 'tool_call_id'}",
                )
            fields |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
        found.append(fields)
    return found
