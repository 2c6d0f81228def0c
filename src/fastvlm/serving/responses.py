"""`/v1/responses`: dialogues with images as the Responses API has them, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import count
from typing import Any

from openai.types.responses import (
    Response,
    ResponseError,
    ResponseOutputMessage,
    ResponseUsage,
)
from openai.types.responses.response import IncompleteDetails

from fastvlm.decoding.reply import Reply
from fastvlm.decoding.request import TokenLogprob
from fastvlm.functional.messages import Prompt
from fastvlm.serving.chat import messages_of
from fastvlm.serving.engine_thread import EngineThread
from fastvlm.serving.errors import SERVER_ERROR, TIMED_OUT, api_error
from fastvlm.serving.replies import Replies
from fastvlm.serving.responses_protocol import ResponsesRequest
from fastvlm.serving.settings import ServerSettings


class ResponseReplies(Replies[ResponsesRequest]):
    """The reply to a request of the Responses API: one message, of one text."""

    id_prefix = "resp_"

    def __init__(
        self, asked: ResponsesRequest, name: str, engine: EngineThread, settings: ServerSettings
    ) -> None:
        super().__init__(asked, name, engine, settings)
        self.item_id = f"msg_{uuid.uuid4().hex}"
        self.place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        """Where the text stands in the response."""
        self._numbers = count()

    async def prompts(self) -> Sequence[Prompt]:
        """Return the instructions and the dialogue. See `Replies.prompts`."""
        asked = self.asked
        messages = await asyncio.to_thread(messages_of, asked.messages(), self.settings, "input")
        if asked.instructions is None:
            return [messages]
        said = [{"type": "text", "text": asked.instructions}]
        return [[{"role": "system", "content": said}, *messages]]

    async def whole(self) -> dict[str, Any]:
        """Return the response, once it is finished. See `Replies.whole`."""
        [reply] = await self.finished()
        found = self.ended(reply)
        if self.asked.return_drafted:
            found["drafted"] = reply.drafted
        return found

    async def chunks(self) -> AsyncGenerator[str, None]:
        """Yield a stream's events. See `Replies.chunks`."""
        begun = self.response("in_progress")
        yield self.event("response.created", response=begun)
        yield self.event("response.in_progress", response=begun)
        item = self.item("in_progress", [])
        yield self.event("response.output_item.added", output_index=0, item=item)
        part = self.part("", [])
        yield self.event("response.content_part.added", **self.place, part=part)
        async with aclosing(self.parts()) as parts:
            async for one in parts:
                if one.piece is not None:
                    yield self.event(
                        "response.output_text.delta",
                        **self.place,
                        delta=one.piece.text,
                        logprobs=self.logprob_content(self.known_logprobs(one) or []),
                        **self.drafted(one),
                    )
        ended = self.ended(self.streams[0].reply)
        [item] = ended["output"]
        [part] = item["content"]
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self.event("response.output_text.done", **self.place, **text)
        yield self.event("response.content_part.done", **self.place, part=part)
        yield self.event("response.output_item.done", output_index=0, item=item)
        yield self.event(f"response.{ended['status']}", response=ended)

    def failure(self, error: Exception) -> str:
        """Return the event that ends a stream that has failed."""
        told = api_error(error)
        code: Any = "server_error" if told.status in (TIMED_OUT, SERVER_ERROR) else "invalid_prompt"
        found = self.response("failed", error=ResponseError(code=code, message=told.message))
        return self.event("response.failed", response=found)

    def ended(self, reply: Reply) -> dict[str, Any]:
        """Return the response with its reply."""
        whole = self.requests[0].finish_reason != "length"
        status = "completed" if whole else "incomplete"
        known: Sequence[TokenLogprob] = reply.logprobs or []
        part = self.part(reply.text, self.logprob_content(known))
        return self.response(
            status,
            output=[ResponseOutputMessage.model_validate(self.item(status, [part]))],
            incomplete_details=None if whole else IncompleteDetails(reason="max_output_tokens"),
            usage=self.response_usage(),
        )

    def response(self, status: Any, **more: Any) -> dict[str, Any]:
        """Return the response as it stands.

        Args:
            status: Its status.
            more: Its fields that come with a reply, or an error.
        """
        asked = self.asked
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
            "tool_choice": asked.tool_choice,
            "tools": [],
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

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the message."""
        return {
            "id": self.item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the message's only part."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

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
