"""Requests as OpenAI's API has them; a field that isn't supported is refused, never ignored."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field

from fastvlm.decoding.structured import Kind, StructuredOutput
from fastvlm.serving.bodies import Body, Strict
from fastvlm.serving.errors import ApiError
from fastvlm.serving.tool_protocol import (
    AskedTools,
    FunctionTool,
    NamedTool,
    ToolCall,
    ToolChoice,
)

GUIDED_KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar")
"""Forms that vLLM's clients ask for by `guided_...`."""


class TextPart(Strict):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is. How finely it is seen is the request's `image_size`."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(Strict):
    """A part of a message: an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
"""A token id as JSON's keys have it, each in one way."""
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Strict):
    """A turn of a dialogue; what is always None is of replies, as clients send them back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class StreamOptions(Strict):
    """What a stream has beside the reply."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Strict):
    """A JSON schema, with its name."""

    name: str = "reply"
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """What a reply is to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structured(self) -> StructuredOutput | None:
        """Return the form; None for any.

        Raises:
            ApiError: The schema is missing.
            InputError: It makes no sense.
        """
        schema = None if self.json_schema is None else self.json_schema.schema_
        return form_of(self.type, schema, "response_format.json_schema")


def form_of(
    kind: Literal["text", "json_object", "json_schema"], schema: dict[str, Any] | None, param: str
) -> StructuredOutput | None:
    """Return a form by OpenAI's names; None for any.

    Args:
        kind: Its type.
        schema: The schema of a `json_schema`.
        param: The field of the request with the schema, for an error.

    Raises:
        ApiError: The schema is missing.
        InputError: It makes no sense.
    """
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput("json_object")
    if schema is None:
        raise ApiError("The schema is missing.", param=param)
    return StructuredOutput("json", schema)


class Sampling(Body):
    """Fields of every endpoint that decodes: how tokens are drawn and drafted.

    `priority` is vLLM's; `strategy` and those below it are fastvlm's own.
    """

    model: str | None = None
    stream: bool = False
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool = False
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    strategy: str | None = None
    num_speculative_tokens: Annotated[int, Field(ge=1, le=256)] | None = None
    return_drafted: bool = False
    cache: bool = True

    @property
    @abstractmethod
    def most_tokens(self) -> int | None:
        """The most tokens of a reply; None for the model's own number."""

    @property
    @abstractmethod
    def most_likely(self) -> int | None:
        """The number of most likely tokens that are told of; None for no log-probabilities."""

    def check(self) -> None:
        """Refuse what OpenAI's API has, and this server doesn't.

        Raises:
            ApiError: There is something.
        """
        most = self.most_tokens
        if most is not None and (self.min_tokens or 0) > most:
            raise ApiError(f"min_tokens is at most {most}, as max_tokens.", param="min_tokens")

    def forms(self) -> dict[str, StructuredOutput]:
        """Return the forms that fields ask for, by the fields.

        Raises:
            ApiError: A schema is missing.
            InputError: One makes no sense.
        """
        given = {kind: getattr(self, f"guided_{kind}") for kind in GUIDED_KINDS}
        return {
            f"guided_{kind}": StructuredOutput(kind, value)
            for kind, value in given.items()
            if value is not None
        }

    def structured(self) -> StructuredOutput | None:
        """Return the form that the reply is to have; None for any.

        Raises:
            ApiError: There are several, or a schema is missing.
            InputError: One makes no sense.
        """
        forms = self.forms()
        if len(forms) > 1:
            raise ApiError(f"Give one of {', '.join(forms)}.", param=[*forms][1])
        return next(iter(forms.values()), None)

    def sampling_options(self, row: int = 0) -> dict[str, Any]:
        """Return the fields of `SamplingParams` and `Scheduling` that the request sets.

        Args:
            row: The number of the choice; choice i is drawn with the seed + i.
        """
        found: dict[str, Any] = {
            "max_new_tokens": self.most_tokens,
            "min_new_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos or None,
            "logprobs": self.most_likely,
            "stop": self.stop,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
            "structured": self.structured(),
            "priority": self.priority,
            "cache": self.cache,
        }
        if self.temperature:
            found |= {
                "temperature": self.temperature,
                "top_p": self.top_p if self.top_p < 1 else None,
                "top_k": self.top_k if self.top_k is not None and self.top_k > 0 else None,
                "min_p": self.min_p or None,
                "seed": None if self.seed is None else self.seed + row,
            }
        return {name: value for name, value in found.items() if value is not None}


class ChoicesRequest(Sampling):
    """Fields of the endpoints whose replies are choices."""

    n: Annotated[int, Field(ge=1, le=16)] = 1
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        """Refuse what this server doesn't support. See `Sampling.check`."""
        super().check()
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is for a stream.", param="stream_options")

    def forms(self) -> dict[str, StructuredOutput]:
        """Return the forms that fields ask for. See `Sampling.forms`."""
        asked = None if self.response_format is None else self.response_format.structured()
        return ({} if asked is None else {"response_format": asked}) | super().forms()


class ChatRequest(ChoicesRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    image_size: Annotated[int, Field(ge=64, le=16384)] | None = None
    tools: Annotated[list[FunctionTool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: ToolChoice | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        """Refuse what this server doesn't support. See `Sampling.check`."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs=true.", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError(
                "Give max_tokens or max_completion_tokens, not both.", param="max_tokens"
            )
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise ApiError("tool_choice needs tools.", param="tool_choice")
        if self.tools is None and self.parallel_tool_calls is not None:
            raise ApiError("parallel_tool_calls needs tools.", param="parallel_tool_calls")

    def asked_tools(self) -> AskedTools:
        """Return what the request says of tools.

        Raises:
            ApiError: The form that the reply is to have makes no sense.
            InputError: It makes no sense.
        """
        choice = self.tool_choice or "auto"
        named = choice.function.name if isinstance(choice, NamedTool) else None
        return AskedTools(
            functions=[tool.function for tool in self.tools or ()],
            choice="required" if isinstance(choice, NamedTool) else choice,
            named=named,
            several=self.parallel_tool_calls is not False,
            called=any(turn.tool_calls for turn in self.messages),
            dialogue="messages",
            form=self.structured(),
        )

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of a reply; None for the model's own number."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def most_likely(self) -> int | None:
        """The number of most likely tokens that are told of; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def sampling_options(self, row: int = 0) -> dict[str, Any]:
        """Return the fields that the request sets, that of `ImageOptions` too."""
        shown = {} if self.image_size is None else {"image_size": self.image_size}
        return super().sampling_options(row) | shown
