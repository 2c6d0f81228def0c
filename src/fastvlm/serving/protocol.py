"""Requests as OpenAI's API has them; a field that isn't supported is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastvlm.decoding.structured import Kind, StructuredOutput
from fastvlm.serving.errors import ApiError

GUIDED_KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar")
"""Forms that vLLM's clients ask for by `guided_...`."""


class Strict(BaseModel):
    """A part of a request, without fields that it doesn't have."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is: a data URL."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """A part of a message: an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Strict):
    """A turn of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class StreamOptions(Strict):
    """What a stream has beside the reply."""

    include_usage: bool = False


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


class Sampling(Strict):
    """Fields of every endpoint that decodes: how tokens are drawn and drafted.

    Those below `strategy` are fastvlm's own.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    strategy: str | None = None
    num_speculative_tokens: Annotated[int, Field(ge=1, le=256)] | None = None
    return_drafted: bool = False

    def check(self) -> None:
        """Refuse what OpenAI's API has, and this server doesn't.

        Raises:
            ApiError: There is something.
        """
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ApiError(f"{name} is not supported; use repetition_penalty.", param=name)
        if self.logit_bias:
            raise ApiError("logit_bias is not supported.", param="logit_bias")
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is for a stream.", param="stream_options")

    def structured(self) -> StructuredOutput | None:
        """Return the form that the reply is to have; None for any.

        Raises:
            ApiError: There are several, or a schema is missing.
            InputError: One makes no sense.
        """
        forms: dict[str, StructuredOutput] = {}
        asked = self.response_format
        if asked is not None and asked.type == "json_object":
            forms["response_format"] = StructuredOutput("json_object")
        elif asked is not None and asked.type == "json_schema":
            if asked.json_schema is None:
                raise ApiError("json_schema is missing.", param="response_format.json_schema")
            forms["response_format"] = StructuredOutput("json", asked.json_schema.schema_)
        for kind in GUIDED_KINDS:
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                forms[f"guided_{kind}"] = StructuredOutput(kind, value)
        if len(forms) > 1:
            raise ApiError(f"Give one of {', '.join(forms)}.", param=[*forms][1])
        return next(iter(forms.values()), None)

    def sampling_options(self, row: int = 0) -> dict[str, Any]:
        """Return the fields of `SamplingParams` that the request sets.

        Args:
            row: The number of the choice; choice i is drawn with the seed + i.
        """
        found: dict[str, Any] = {
            "stop": self.stop,
            "repetition_penalty": self.repetition_penalty,
            "structured": self.structured(),
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


class ChatRequest(Sampling):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    image_size: Annotated[int, Field(ge=64, le=16384)] | None = None

    def check(self) -> None:
        """Refuse what this server doesn't support. See `Sampling.check`."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs=true.", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError(
                "Give max_tokens or max_completion_tokens, not both.", param="max_tokens"
            )

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of a reply; None for the model's own number."""
        return self.max_completion_tokens or self.max_tokens
