"""`/v1/chat/completions`: dialogues with images, answered whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs

from fastvlm.decoding.reply import Reply
from fastvlm.decoding.request import TokenLogprob
from fastvlm.functional.messages import Message, Prompt
from fastvlm.serving.images import ImageOpener
from fastvlm.serving.protocol import ChatMessage, ChatRequest, TextPart
from fastvlm.serving.replies import ChoiceReplies, Part
from fastvlm.serving.settings import ServerSettings


def messages_of(
    asked: Sequence[ChatMessage], settings: ServerSettings, field: str = "messages"
) -> list[Message]:
    """Return a dialogue as the model takes it, its images open.

    Args:
        asked: The dialogue.
        settings: What images there may be.
        field: The field of the request that it comes from.

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
            param = f"{field}.{turn}.content.{place}.image_url"
            parts.append({"type": "image", "image": opener.open(part.image_url.url, param)})
        found.append({"role": role, "content": parts})
    return found


class ChatReplies(ChoiceReplies[ChatRequest]):
    """The replies to a dialogue."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    async def prompts(self) -> Sequence[Prompt]:
        """Return the dialogue. See `Replies.prompts`."""
        return [await asyncio.to_thread(messages_of, self.asked.messages, self.settings)]

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        """Return a choice that is finished."""
        return Choice(
            index=index,
            finish_reason=self.finish_reason(index),
            message=ChatCompletionMessage(role="assistant", content=reply.text),
            logprobs=self.logprobs(reply.logprobs),
        ).model_dump(mode="json", exclude_unset=True)

    def first_change(self, _: int) -> dict[str, Any]:
        """Return whose message a choice of a stream is."""
        return {"delta": {"role": "assistant", "content": ""}}

    def changes(self, part: Part) -> Iterator[dict[str, Any]]:
        """Yield what a piece, or its end, brings of a choice of a stream."""
        if part.piece is None:
            yield {"delta": {}, "finish_reason": self.finish_reason(part.index)}
            return
        found: dict[str, Any] = {"delta": {"content": part.piece.text}, **self.drafted(part)}
        logprobs = self.logprobs(self.known_logprobs(part))
        if logprobs is not None:
            found["logprobs"] = logprobs.model_dump(mode="json")
        yield found

    def logprobs(self, known: Sequence[TokenLogprob] | None) -> ChoiceLogprobs | None:
        """Return log-probabilities as the API has them; None without any."""
        if known is None:
            return None
        return ChoiceLogprobs.model_validate({"content": self.logprob_content(known)})
