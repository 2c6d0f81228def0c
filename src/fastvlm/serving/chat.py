"""`/v1/chat/completions`: dialogues with images, answered whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from openai.types.chat.chat_completion import Choice, ChoiceLogprobs

from fastvlm.decoding.reply import Reply
from fastvlm.decoding.request import TokenLogprob
from fastvlm.functional.messages import Message, Prompt
from fastvlm.serving.images import ImageOpener
from fastvlm.serving.protocol import ChatMessage, ChatRequest, TextPart
from fastvlm.serving.replies import ChoiceReplies, Part
from fastvlm.serving.settings import ServerSettings
from fastvlm.serving.tools import ReplyMessage, ToolUse, tool_fields


def messages_of(
    asked: Sequence[ChatMessage], settings: ServerSettings, field: str = "messages"
) -> list[Message]:
    """Return a dialogue as the model takes it, its images open.

    Args:
        asked: The dialogue.
        settings: What images there may be.
        field: The field of the request that it comes from.

    Raises:
        ApiError: An image is none, there are too many, or a call of a tool makes no sense.
    """
    found: list[Message] = []
    opener = ImageOpener(settings)
    for turn, (message, tools) in enumerate(zip(asked, tool_fields(asked, field), strict=True)):
        role = "system" if message.role == "developer" else message.role
        content = message.content or ""
        if isinstance(content, str):
            # Templates of text alone take no list of parts.
            found.append({"role": role, "content": content, **tools})
            continue
        parts: list[dict[str, Any]] = []
        for place, part in enumerate(content):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            param = f"{field}.{turn}.content.{place}.image_url"
            parts.append({"type": "image", "image": opener.open(part.image_url.url, param)})
        found.append({"role": role, "content": parts, **tools})
    return found


class ChatReplies(ChoiceReplies[ChatRequest]):
    """The replies to a dialogue."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    tools: ToolUse
    """The tools that the model may call."""
    messages: list[ReplyMessage]
    """The choices' messages, as their texts come."""

    async def prompts(self) -> Sequence[Prompt]:
        """Return the dialogue, with its tools. See `Replies.prompts`."""
        messages = await asyncio.to_thread(messages_of, self.asked.messages, self.settings)
        self.tools = await asyncio.to_thread(ToolUse.of, self.asked.asked_tools(), self.vlm)
        self.messages = [ReplyMessage(self.tools) for _ in range(self.per_prompt)]
        return [self.tools.shown(messages)]

    def options(self, row: int) -> dict[str, Any]:
        """Return the options of a reply, those of required calls too. See `Replies.options`."""
        return super().options(row) | self.tools.options

    def finish_reason(self, index: int) -> Any:
        """Return why a choice has ended: its calls, if it has any."""
        return self.messages[index].finish_reason(super().finish_reason(index))

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        """Return a choice that is finished."""
        message = self.messages[index].whole(reply.text)
        return Choice(
            index=index,
            finish_reason=self.finish_reason(index),
            message=message,
            logprobs=self.logprobs(reply.logprobs),
        ).model_dump(mode="json", exclude_unset=True)

    def first_change(self, _: int) -> dict[str, Any]:
        """Return whose message a choice of a stream is."""
        return {"delta": {"role": "assistant", "content": ""}}

    def changes(self, part: Part) -> Iterator[dict[str, Any]]:
        """Yield what a piece, or its end, brings of a choice of a stream."""
        message = self.messages[part.index]
        if part.piece is None:
            if rest := message.end():
                yield {"delta": rest}
            yield {"delta": {}, "finish_reason": self.finish_reason(part.index)}
            return
        found: dict[str, Any] = {"delta": message.feed(part.piece.text), **self.drafted(part)}
        logprobs = self.logprobs(self.known_logprobs(part))
        if logprobs is not None:
            found["logprobs"] = logprobs.model_dump(mode="json")
        yield found

    def logprobs(self, known: Sequence[TokenLogprob] | None) -> ChoiceLogprobs | None:
        """Return log-probabilities as the API has them; None without any."""
        if known is None:
            return None
        return ChoiceLogprobs.model_validate({"content": self.logprob_content(known)})
