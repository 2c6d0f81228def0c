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
from fastvlm.serving.protocol import ChatMessage, ChatRequest, Function, NamedTool
from fastvlm.serving.tool_formats import ToolFormat, tool_format
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
    def of(cls, asked: ChatRequest, vlm: VisionLanguageModel) -> ToolUse:
        """Return the tools of a request.

        Raises:
            ApiError: The model has no tools, or not in a format that is known; or fields of the
                request contradict each other.
        """
        functions = [tool.function for tool in asked.tools or ()]
        check_tools(asked, functions)
        shown = bool(functions) and asked.tool_choice != "none"
        if not shown and not any(turn.tool_calls for turn in asked.messages):
            return cls()
        form = tool_format(vlm.prompts, vlm.tokenizer)
        if form is None:
            raise ApiError(
                "The chat template of this model has no tools in a format that is known here"
                " (Qwen's and Hermes', Llama 3's, or Mistral's).",
                param="tools" if shown else "messages",
            )
        if not shown:
            return cls()
        try:
            structured = constrained(asked, functions, form)
            vlm.grammars.constraint(structured, vlm.end_tokens)
        except InputError as error:
            raise ApiError(
                f"No call can be held to these tools: {first_line(error)}.", param="tools"
            ) from error
        return cls(functions, form, structured)

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

    def message(self) -> ReplyMessage:
        """Return a reply's message, before any of it is known."""
        if self.form is None:
            return ReplyMessage(PlainReader())
        return ReplyMessage(self.form.reader({one.name for one in self.functions}), self.form)


class ReplyMessage:
    """The message of one reply, whose text comes piece by piece.

    Args:
        reader: Reads content and calls out of the text.
        form: The format of the calls; None without tools.
    """

    def __init__(self, reader: CallReader | PlainReader, form: ToolFormat | None = None) -> None:
        self.reader, self.form = reader, form
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
                assert self.form is not None  # a plain reader reads no calls
                function = {"name": part.name, "arguments": part.arguments}
                call = {"id": self.form.call_id(), "type": "function", "function": function}
                changed.append({"index": len(self.calls), **copy.deepcopy(call)})
                self.calls.append(call)
            else:
                self.calls[-1]["function"]["arguments"] += part.text
                more = {"arguments": part.text}
                changed.append({"index": len(self.calls) - 1, "function": more})
        self.content += content
        found: dict[str, Any] = {"content": content} if content else {}
        return found | ({"tool_calls": changed} if changed else {})


def check_tools(asked: ChatRequest, functions: Sequence[Function]) -> None:
    """Refuse fields on tools that contradict each other.

    Raises:
        ApiError: They do.
    """
    names = [one.name for one in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ApiError(f"There are several tools with the name {twice!r}.", param="tools")
    choice = asked.tool_choice
    if not functions:
        if choice not in (None, "none"):
            raise ApiError("tool_choice needs tools.", param="tool_choice")
        if asked.parallel_tool_calls is not None:
            raise ApiError("parallel_tool_calls needs tools.", param="parallel_tool_calls")
        return
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise ApiError(f"There is no tool {choice.function.name!r}.", param="tool_choice")
    for number, one in enumerate(functions):
        if (one.parameters or {}).get("type", "object") != "object":
            raise ApiError(
                f"The parameters of {one.name!r} are a schema of another type than object.",
                param=f"tools.{number}.function.parameters",
            )
    if choice != "none" and asked.structured() is not None:
        raise ApiError(
            "A reply that may call tools has no other form; set tool_choice to none, or leave the"
            " form out.",
            param="tools",
        )


def constrained(
    asked: ChatRequest, functions: Sequence[Function], form: ToolFormat
) -> StructuredOutput | None:
    """Return what a reply is to look like; None for anything.

    Args:
        asked: The request.
        functions: The functions that the model is shown.
        form: The format of its calls.
    """
    choice = asked.tool_choice
    required = choice == "required" or isinstance(choice, NamedTool)
    strict = any(one.strict for one in functions)
    several = asked.parallel_tool_calls is not False
    if not required and not strict and several:
        return None
    if isinstance(choice, NamedTool):
        functions = [one for one in functions if one.name == choice.function.name]
    grammar = form.grammar(
        {one.name: schema(one, required=required) for one in functions},
        several=several and not isinstance(choice, NamedTool),
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
        ApiError: An answer is to no call, arguments aren't a JSON object, or a field isn't for the
            role.
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
                        "arguments": arguments_of(
                            call.function.arguments,
                            f"{param}.tool_calls.{number}.function.arguments",
                        ),
                    },
                }
                for number, call in enumerate(message.tool_calls)
            ]
            names |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                raise ApiError(
                    f"No call before it has the id {message.tool_call_id!r}.",
                    param=f"{param}.tool_call_id",
                )
            fields |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
        found.append(fields)
    return found


def arguments_of(text: str, param: str) -> dict[str, Any]:
    """Return the arguments of a call, read from JSON.

    Raises:
        ApiError: They are no JSON object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError("The arguments of a call are a JSON object.", param=param)
    return found
