"""`/v1/responses`: dialogues with images as the Responses API has them, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from itertools import count
from typing import Any

from openai.types.responses import (
    Response,
    ResponseError,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseUsage,
)
from openai.types.responses.response import IncompleteDetails
from pydantic import BaseModel

from fastvlm.decoding.request import TokenLogprob
from fastvlm.functional.messages import Message, Prompt
from fastvlm.serving.chat import messages_of
from fastvlm.serving.engine_thread import EngineThread
from fastvlm.serving.errors import SERVER_ERROR, TIMED_OUT, api_error
from fastvlm.serving.replies import Replies
from fastvlm.serving.response_items import ResponseItems
from fastvlm.serving.responses_protocol import ResponsesRequest
from fastvlm.serving.settings import ServerSettings
from fastvlm.serving.tools import ToolUse

OUTPUT_ITEMS: Mapping[str, type[BaseModel]] = {
    "message": ResponseOutputMessage,
    "function_call": ResponseFunctionToolCall,
}
"""The official types of a response's items."""


def with_calls(turns: Sequence[Message]) -> list[Message]:
    """Return a dialogue as chat templates have it: calls stand in the assistant's turn before."""
    found: list[Message] = []
    for turn in turns:
        calls = turn.get("tool_calls")
        if calls and found and found[-1]["role"] == "assistant":
            found[-1] = {**found[-1], "tool_calls": [*found[-1].get("tool_calls", ()), *calls]}
        else:
            found.append(turn)
    return found


class ResponseReplies(Replies[ResponsesRequest]):
    """The reply to a request of the Responses API: messages, and calls of functions."""

    id_prefix = "resp_"

    tools: ToolUse
    """The tools that the model may call."""
    items: ResponseItems
    """What the response is made of, as its text comes."""

    def __init__(
        self, asked: ResponsesRequest, name: str, engine: EngineThread, settings: ServerSettings
    ) -> None:
        super().__init__(asked, name, engine, settings)
        self._numbers = count()

    async def prompts(self) -> Sequence[Prompt]:
        """Return the instructions and the dialogue, with its tools. See `Replies.prompts`."""
        asked = self.asked
        turns = await asyncio.to_thread(messages_of, asked.messages(), self.settings, "input")
        messages = with_calls(turns)
        if asked.instructions is not None:
            said = [{"type": "text", "text": asked.instructions}]
            messages = [{"role": "system", "content": said}, *messages]
        self.tools = await asyncio.to_thread(ToolUse.of, asked.asked_tools(), self.vlm)
        self.items = ResponseItems(self.tools)
        return [self.tools.shown(messages)]

    def options(self, row: int) -> dict[str, Any]:
        """Return the options of the reply, those of required calls too. See `Replies.options`."""
        return super().options(row) | self.tools.options

    async def whole(self) -> dict[str, Any]:
        """Return the response, once it is finished. See `Replies.whole`."""
        [reply] = await self.finished()
        known: Sequence[TokenLogprob] = reply.logprobs or []
        for _ in self.items.feed(reply.text, self.logprob_content(known)):
            pass
        for _ in self.items.end(self.status):
            pass
        found = self.ended()
        if self.asked.return_drafted:
            found["drafted"] = reply.drafted
        return found

    async def chunks(self) -> AsyncGenerator[str, None]:
        """Yield a stream's events. See `Replies.chunks`."""
        begun = self.response("in_progress")
        yield self.event("response.created", response=begun)
        yield self.event("response.in_progress", response=begun)
        async with aclosing(self.parts()) as parts:
            async for one in parts:
                if one.piece is not None:
                    known = self.logprob_content(self.known_logprobs(one) or [])
                    drafted = self.drafted(one).get("drafted", [])
                    for kind, content in self.items.feed(one.piece.text, known, drafted):
                        yield self.event(kind, **content)
        for kind, content in self.items.end(self.status):
            yield self.event(kind, **content)
        yield self.event(f"response.{self.status}", response=self.ended())

    def failure(self, error: Exception) -> str:
        """Return the event that ends a stream that has failed."""
        told = api_error(error)
        code: Any = "server_error" if told.status in (TIMED_OUT, SERVER_ERROR) else "invalid_prompt"
        found = self.response("failed", error=ResponseError(code=code, message=told.message))
        return self.event("response.failed", response=found)

    @property
    def status(self) -> str:
        """The status of the response with its whole reply."""
        return "incomplete" if self.requests[0].finish_reason == "length" else "completed"

    def ended(self) -> dict[str, Any]:
        """Return the response with its reply."""
        whole = self.status == "completed"
        return self.response(
            self.status,
            output=[OUTPUT_ITEMS[item["type"]].model_validate(item) for item in self.items.items],
            incomplete_details=None if whole else IncompleteDetails(reason="max_output_tokens"),
            usage=self.response_usage(),
        )

    def response(self, status: Any, **more: Any) -> dict[str, Any]:
        """Return the response as it stands.

        Args:
            status: Its status.
            more: Its fields that come with a reply, or an error.
        """
        asked, choice = self.asked, self.asked.tool_choice
        found = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "model": self.name,
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "background": False,
            "temperature": asked.temperature,
            "text": asked.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [{**one.model_dump(), "strict": bool(one.strict)} for one in asked.tools],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": asked.truncation,
            "usage": None,
            "user": asked.user,
            "safety_identifier": asked.safety_identifier,
            "store": False,
        }
        made = Response.model_validate(found | more)
        return made.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def response_usage(self) -> ResponseUsage:
        """Return the tokens of the prompt and the reply."""
        usage = self.usage()
        cached, counted = usage.prompt_tokens_details, usage.completion_tokens_details
        assert cached is not None
        assert counted is not None
        return ResponseUsage.model_validate(
            {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": cached.cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {
                    "reasoning_tokens": 0,
                    "accepted_prediction_tokens": counted.accepted_prediction_tokens,
                    "rejected_prediction_tokens": counted.rejected_prediction_tokens,
                },
                "total_tokens": usage.total_tokens,
            }
        )

    def event(self, kind: str, **content: Any) -> str:
        """Return an event of the stream.

        Args:
            kind: Its type.
            content: Its fields.
        """
        found = {"type": kind, "sequence_number": next(self._numbers), **content}
        return f"event: {kind}\ndata: {json.dumps(found, ensure_ascii=False)}\n\n"
