"""The body of `/v1/responses`; a field that isn't supported is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fastvlm.decoding.structured import StructuredOutput
from fastvlm.serving.bodies import Body, Strict
from fastvlm.serving.errors import ApiError
from fastvlm.serving.protocol import (
    ChatMessage,
    ImagePart,
    ImageUrl,
    Part,
    Sampling,
    TextPart,
    form_of,
)
from fastvlm.serving.tool_protocol import (
    Arguments,
    AskedTools,
    CalledFunction,
    Function,
    ToolCall,
    ToolChoice,
)

Status = Literal["in_progress", "completed", "incomplete"]
"""How far an item of an earlier response is."""
LOGPROBS = "message.output_text.logprobs"
"""What a request includes to have log-probabilities."""


class InputText(Strict):
    """A part of a message: text."""

    type: Literal["input_text"]
    text: str


class InputImage(Body):
    """A part of a message: an image."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto"] = "auto"


class OutputText(Body):
    """A part of an earlier reply: text, with what was told of it then."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list, max_length=0)
    logprobs: list[dict[str, Any]] = Field(default_factory=list)


InputPart = Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]


class InputMessage(Body):
    """A turn of a dialogue; an earlier reply may come as the server gave it."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: Status | None = None

    def message(self) -> ChatMessage:
        """Return the turn as chats have it."""
        return ChatMessage(role=self.role, content=chat_content(self.content))


class FunctionCall(Body):
    """A call in an earlier response."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments
    id: str | None = None
    status: Status | None = None

    def message(self) -> ChatMessage:
        """Return the call as a turn of a chat."""
        called = CalledFunction(name=self.name, arguments=self.arguments)
        call = ToolCall(id=self.call_id, type="function", function=called)
        return ChatMessage(role="assistant", tool_calls=[call])


class FunctionCallOutput(Body):
    """What a call has given."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]
    id: str | None = None
    status: Status | None = None

    def message(self) -> ChatMessage:
        """Return the output as a turn of a chat."""
        content = chat_content(self.output)
        return ChatMessage(role="tool", content=content, tool_call_id=self.call_id)


def chat_content(content: str | Sequence[InputPart]) -> str | list[Part]:
    """Return the content of a turn as chats have it."""
    return content if isinstance(content, str) else [chat_part(part) for part in content]


def chat_part(part: InputPart) -> Part:
    """Return a part of a message as chats have it."""
    if not isinstance(part, InputImage):
        return TextPart(type="text", text=part.text)
    shown = ImageUrl(url=part.image_url)
    return ImagePart(type="image_url", image_url=shown)


def item_type(item: Any) -> Any:
    """Return the type of an item of the input; a message may leave it out."""
    found = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if found is None else found


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(item_type),
]


class Typed(Strict):
    """What has a type, which comes before its other fields in errors."""

    type: Literal["function"]


class ResponsesFunction(Function, Typed):
    """A tool: a function."""


class NamedFunction(Strict):
    """The function that the model must call."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """What a reply is to look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    def structured(self) -> StructuredOutput | None:
        """Return the form; None for any.

        Raises:
            ApiError: The schema is missing.
            InputError: It makes no sense.
        """
        return form_of(self.type, self.schema_, "text.format.schema")


class TextConfig(Body):
    """What is asked of a reply's text."""

    format: TextFormat = TextFormat()


class ResponseStreamOptions(Body):
    """What a stream has beside the reply: nothing."""

    include_obfuscation: Literal[False] = False


class ResponsesRequest(Sampling):
    """The body of `/v1/responses`.

    Responses aren't stored, so that none can be referred to; the only tools are functions.
    """

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextConfig = TextConfig()
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = (
        Field(default_factory=dict, max_length=16)
    )
    store: Literal[False] = False
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    tools: list[ResponsesFunction] = Field(default_factory=list, max_length=128)
    tool_choice: ToolChoice | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    safety_identifier: str | None = None
    stream_options: ResponseStreamOptions | None = None
    image_size: Annotated[int, Field(ge=64, le=16384)] | None = None

    def check(self) -> None:
        """Refuse what this server doesn't support. See `Sampling.check`."""
        super().check()
        if self.top_logprobs is not None and not self.include:
            raise ApiError(f"top_logprobs needs include=[{LOGPROBS!r}].", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is for a stream.", param="stream_options")
        if not self.tools and self.tool_choice not in ("auto", "none"):
            raise ApiError("tool_choice needs tools.", param="tool_choice")
        if self.tools and self.tool_choice != "none" and self.include:
            raise ApiError(
                "The log-probabilities of a reply that may call tools are not supported.",
                param="include",
            )

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of a reply; None for the model's own number."""
        return self.max_output_tokens

    @property
    def most_likely(self) -> int | None:
        """The number of most likely tokens that are told of; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.include else None

    def forms(self) -> dict[str, StructuredOutput]:
        """Return the forms that fields ask for. See `Sampling.forms`."""
        asked = self.text.format.structured()
        return ({} if asked is None else {"text.format": asked}) | super().forms()

    def sampling_options(self, row: int = 0) -> dict[str, Any]:
        """Return the fields that the request sets, that of `ImageOptions` too."""
        shown = {} if self.image_size is None else {"image_size": self.image_size}
        return super().sampling_options(row) | shown

    def messages(self) -> list[ChatMessage]:
        """Return the input as chats have it."""
        if isinstance(self.input, str):
            return [ChatMessage(role="user", content=self.input)]
        return [item.message() for item in self.input]

    def asked_tools(self) -> AskedTools:
        """Return what the request says of tools.

        Raises:
            ApiError: The form that the reply is to have makes no sense.
            InputError: It makes no sense.
        """
        choice = self.tool_choice
        named = choice.name if isinstance(choice, NamedFunction) else None
        return AskedTools(
            functions=self.tools,
            choice="required" if isinstance(choice, NamedFunction) else choice,
            named=named,
            several=self.parallel_tool_calls,
            called=any(isinstance(item, FunctionCall) for item in self.input),
            dialogue="input",
            form=self.structured(),
        )
