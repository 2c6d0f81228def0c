"""Tools and their calls as requests have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from fastvlm.decoding.structured import StructuredOutput
from fastvlm.serving.bodies import Strict


def check_arguments(text: str) -> str:
    """Return the arguments of a call, which are a JSON object.

    Raises:
        PydanticCustomError: They are none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PydanticCustomError("arguments", "The arguments of a call are a JSON object")
    return text


def check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a function's arguments, which is one of objects.

    Raises:
        PydanticCustomError: It is one of another type.
    """
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("parameters", "A function's parameters are a schema of objects")
    return schema


Arguments = Annotated[str, AfterValidator(check_arguments)]


class CalledFunction(Strict):
    """What a call calls; the arguments are JSON."""

    name: str
    arguments: Arguments


class ToolCall(Strict):
    """A call in an earlier turn of the assistant's."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Function(Strict):
    """A function that the model may call, with the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(check_parameters)] | None = None
    strict: bool | None = None


class FunctionTool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The tool that the model must call."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class AskedTools:
    """What a request says of tools, whichever endpoint it came to.

    Args:
        functions: The functions that it names.
        choice: Whether the model may or must call them.
        named: The one that it must call; None for any.
        several: Whether a reply may have several calls.
        called: Whether earlier turns have calls.
        dialogue: The field that the dialogue is in.
        form: What the reply is to look like otherwise; None for anything.
    """

    functions: Sequence[Function]
    choice: ToolChoice
    named: str | None
    several: bool
    called: bool
    dialogue: str
    form: StructuredOutput | None

    @property
    def shown(self) -> bool:
        """Whether the model is shown the functions."""
        return bool(self.functions) and self.choice != "none"
