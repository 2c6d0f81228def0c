"""`/v1/chat/completions`: dialogues with images, answered whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import (
    ChatCompletionTokenLogprob,
    TopLogprob,
)
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from fastvlm.decoding.reply import Piece, Reply, ReplyStream
from fastvlm.decoding.request import Request, TokenLogprob
from fastvlm.functional.messages import Message
from fastvlm.serving.engine_thread import EngineThread, ServedStream
from fastvlm.serving.errors import api_error
from fastvlm.serving.images import ImageOpener
from fastvlm.serving.protocol import ChatMessage, ChatRequest, TextPart
from fastvlm.serving.settings import ServerSettings
from fastvlm.vlm import VisionLanguageModel


def messages_of(asked: Sequence[ChatMessage], settings: ServerSettings) -> list[Message]:
    """Return a dialogue as the model takes it, its images open.

    Raises:
        ApiError: An image is none, or there are too many.
    """
    found: list[Message] = []
    opener = ImageOpener(settings)
    for turn, message in enumerate(asked):
        role = "system" if message.role == "developer" else message.role
        parts: list[dict[str, Any]] = []
        content = message.content
        for place, part in enumerate(
            [TextPart(type="text", text=content)] if isinstance(content, str) else content
        ):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            param = f"messages.{turn}.content.{place}.image_url.url"
            parts.append({"type": "image", "image": opener.open(part.image_url.url, param)})
        found.append({"role": role, "content": parts})
    return found


class ChatReplies:
    """The replies to a request: its choices, whole or as chunks of a stream.

    Args:
        asked: The request.
        name: The model's name in the API.
        streams: The streams of the choices.
        vlm: The model.
    """

    def __init__(
        self,
        asked: ChatRequest,
        name: str,
        streams: Sequence[ServedStream],
        vlm: VisionLanguageModel,
    ) -> None:
        self.asked, self.name, self.streams, self.vlm = asked, name, streams, vlm
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    @classmethod
    async def begin(
        cls, asked: ChatRequest, name: str, engine: EngineThread, settings: ServerSettings
    ) -> ChatReplies:
        """Return the replies to a request, which have begun.

        Raises:
            ApiError: The request is refused.
            FastVlmError: The model refuses it.
        """
        asked.check()
        vlm = engine.vlm
        messages = await asyncio.to_thread(messages_of, asked.messages, settings)
        drafts: dict[str, Any] = (
            {}
            if asked.num_speculative_tokens is None
            else {"num_speculative_tokens": asked.num_speculative_tokens}
        )
        strategy = vlm.strategy(asked.strategy, **drafts)
        options: dict[str, Any] = {"max_new_tokens": asked.most_tokens}
        options |= {"logprobs": asked.top_logprobs or 0} if asked.logprobs else {}
        options |= {} if asked.image_size is None else {"image_size": asked.image_size}
        given = {key: value for key, value in options.items() if value is not None}
        streams: list[ServedStream] = []
        try:
            for row in range(asked.n):

                def make(row: int = row) -> ReplyStream:
                    return vlm.stream(
                        messages, strategy=strategy, **given, **asked.sampling_options(row)
                    )

                streams.append(await engine.submit(make))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return cls(asked, name, streams, vlm)

    def close(self) -> None:
        """End what isn't finished."""
        for stream in self.streams:
            stream.close()

    async def whole(self) -> dict[str, Any]:
        """Return all choices, once they are finished.

        Raises:
            Exception: A choice failed with this error.
        """
        for stream in self.streams:
            async for _ in stream:
                pass
        replies = [stream.reply for stream in self.streams]
        choices = [
            Choice(
                index=index,
                finish_reason=finish_reason(reply),
                message=ChatCompletionMessage(role="assistant", content=reply.text),
                logprobs=self.logprobs(reply.logprobs),
            )
            for index, reply in enumerate(replies)
        ]
        found = ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.name,
            choices=choices,
            usage=self.usage(),
        ).model_dump(mode="json", exclude_unset=True)
        if self.asked.return_drafted:
            for choice, reply in zip(found["choices"], replies, strict=True):
                choice["drafted"] = reply.drafted
        return found

    async def chunks(self) -> AsyncIterator[str]:
        """Yield a stream's events, as server-sent events have them; an error is the last one."""
        arrived: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

        async def follow(index: int, stream: ServedStream) -> None:
            try:
                async for piece in stream:
                    arrived.put_nowait((index, piece))
                arrived.put_nowait((index, None))
            except Exception as error:  # noqa: BLE001 (the request's own, which the client is told)
                arrived.put_nowait((index, error))

        tasks = [asyncio.ensure_future(follow(*one)) for one in enumerate(self.streams)]
        shown = [0] * len(tasks)
        try:
            for index in range(len(tasks)):
                yield self.event(index, {"role": "assistant", "content": ""})
            going = len(tasks)
            while going:
                index, found = await arrived.get()
                if isinstance(found, Exception):
                    yield event(api_error(found).body)
                    return
                if found is None:
                    going -= 1
                    reason = finish_reason(self.streams[index].reply)
                    yield self.event(index, {}, finish=reason)
                    continue
                first, shown[index] = shown[index], shown[index] + len(found.token_ids)
                yield self.event(index, {"content": found.text}, found, first)
            if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
                yield event(
                    self.chunk([])
                    | {"usage": self.usage().model_dump(mode="json")}
                    | {"fastvlm": self.acceptance()}
                )
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    def event(
        self,
        index: int,
        delta: dict[str, Any],
        piece: Piece | None = None,
        first: int = 0,
        finish: str | None = None,
    ) -> str:
        """Return an event of one choice.

        Args:
            index: The choice.
            delta: What has come of its message.
            piece: The piece that it is, if it is one.
            first: The number of the piece's first token.
            finish: Why the choice has ended, if it has.
        """
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish}
        if piece is not None and self.asked.logprobs:
            known = self.streams[index].stream.request.token_logprobs
            found = self.logprobs(known[first : first + len(piece.token_ids)])
            choice["logprobs"] = None if found is None else found.model_dump(mode="json")
        if piece is not None and self.asked.return_drafted:
            choice["drafted"] = list(piece.drafted)
        return event(self.chunk([choice]))

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.name,
            "choices": choices,
        }

    def usage(self) -> CompletionUsage:
        """Return the tokens of all choices; the prompt counts once."""
        requests = [stream.stream.request for stream in self.streams]
        prompt = len(requests[0].prompt_token_ids)
        made = sum(len(request.output_token_ids) for request in requests)
        accepted = sum(sum(request.accepted) for request in requests)
        proposed = sum(sum(request.proposed) for request in requests)
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=made,
            total_tokens=prompt + made,
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=accepted,
                rejected_prediction_tokens=proposed - accepted,
            ),
            prompt_tokens_details=PromptTokensDetails(cached_tokens=requests[0].cached),
        )

    def acceptance(self) -> dict[str, Any]:
        """Return how many tokens each cycle of the first choice drafted and accepted."""
        request: Request = self.streams[0].stream.request
        return {"proposed_per_cycle": request.proposed, "accepted_per_cycle": request.accepted}

    def logprobs(self, known: Sequence[TokenLogprob] | None) -> ChoiceLogprobs | None:
        """Return log-probabilities as the API has them; None without any."""
        if known is None or not self.asked.logprobs:
            return None
        return ChoiceLogprobs(
            content=[
                ChatCompletionTokenLogprob(
                    **self.token(one.token_id, one.logprob),
                    top_logprobs=[TopLogprob(**self.token(*pair)) for pair in one.top.items()],
                )
                for one in known
            ]
        )

    def token(self, token_id: int, logprob: float) -> dict[str, Any]:
        """Return a token with its text and its bytes."""
        text = self.vlm.tokenizer.decode([token_id])
        assert isinstance(text, str)  # of one list of tokens
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


def finish_reason(reply: Reply) -> Any:
    """Return why a reply ended as the API has it."""
    return "length" if reply.finish_reason == "length" else "stop"


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
