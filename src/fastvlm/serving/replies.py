"""The replies to a request, whichever endpoint it came to: begun, merged, counted and closed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from fastvlm.decoding.reply import Piece, Reply
from fastvlm.decoding.request import Request, TokenLogprob
from fastvlm.decoding.text import token_bytes
from fastvlm.functional.messages import Prompt
from fastvlm.serving.engine_thread import EngineThread, ServedStream
from fastvlm.serving.errors import api_error
from fastvlm.serving.protocol import ChoicesRequest, Sampling
from fastvlm.serving.settings import ServerSettings

AskedT = TypeVar("AskedT", bound=Sampling)
ChoicesT = TypeVar("ChoicesT", bound=ChoicesRequest)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one of several replies, or its end.

    Args:
        index: Which reply.
        piece: The piece; None at the end.
        first: The number of the piece's first token in its reply.
    """

    index: int
    piece: Piece | None
    first: int


class Replies(ABC, Generic[AskedT]):
    """The replies to a request: whole, or as the events of a stream.

    Args:
        asked: The request.
        name: The model's name in the API.
        engine: Where they are decoded.
        settings: How the server runs.
    """

    id_prefix: ClassVar[str]

    def __init__(
        self, asked: AskedT, name: str, engine: EngineThread, settings: ServerSettings
    ) -> None:
        self.asked, self.name, self.settings = asked, name, settings
        self.engine, self.vlm = engine, engine.vlm
        self.id, self.created = f"{self.id_prefix}{uuid.uuid4().hex}", int(time.time())
        self.streams: list[ServedStream] = []

    @property
    def prompt_count(self) -> int:
        """The number of prompts."""
        return 1

    @property
    def per_prompt(self) -> int:
        """The number of replies to each prompt."""
        return 1

    @property
    def to_begin(self) -> int:
        """The number of replies that have not begun."""
        return self.prompt_count * self.per_prompt - len(self.streams)

    @abstractmethod
    async def prompts(self) -> Sequence[Prompt]:
        """Return the prompts as the model takes them.

        Raises:
            ApiError: One is refused.
            FastVlmError: The model refuses one.
        """

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """Return all replies, once they are finished.

        Raises:
            Exception: One failed with this error.
        """

    @abstractmethod
    def chunks(self) -> AsyncGenerator[str, None]:
        """Yield a stream's events, as server-sent events have them.

        Raises:
            Exception: A reply failed with this error.
        """

    def options(self, row: int) -> dict[str, Any]:
        """Return the options of a reply to a prompt, once the prompts are known.

        Args:
            row: The number of the reply to its prompt.
        """
        return self.asked.sampling_options(row)

    def failure(self, error: Exception) -> str:
        """Return the event that ends a stream that has failed."""
        return event(api_error(error).body)

    async def begin(self) -> None:
        """Begin the replies.

        Raises:
            ApiError: The request is refused.
            FastVlmError: The model refuses it.
        """
        asked = self.asked
        asked.check()
        prompts = await self.prompts()
        for prompt in prompts:
            self.engine.check_length(prompt)
        drafts: dict[str, Any] = (
            {}
            if asked.num_speculative_tokens is None
            else {"num_speculative_tokens": asked.num_speculative_tokens}
        )
        strategy = self.vlm.strategy(asked.strategy, **drafts)
        try:
            for prompt in prompts:
                for row in range(self.per_prompt):
                    options = self.options(row)
                    plan = partial(self.vlm.planned_request, prompt, strategy=strategy, **options)
                    # Whoever wants to see which tokens were drafted gets each with its text.
                    together = not asked.return_drafted
                    self.streams.append(await self.engine.submit(plan, together=together))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what isn't finished."""
        for stream in self.streams:
            stream.close()

    async def finished(self) -> list[Reply]:
        """Return the replies, once they are finished.

        Raises:
            Exception: One failed with this error.
        """
        for stream in self.streams:
            async for _ in stream:
                pass
        return [stream.reply for stream in self.streams]

    async def parts(self) -> AsyncGenerator[Part, None]:
        """Yield the pieces of all replies as they come, and the end of each.

        Raises:
            Exception: A reply failed with this error; nothing comes of the others.
        """
        arrived: asyncio.Queue[Part | Exception] = asyncio.Queue()

        async def follow(index: int, stream: ServedStream) -> None:
            first = 0
            try:
                async for piece in stream:
                    arrived.put_nowait(Part(index, piece, first))
                    first += len(piece.token_ids)
                arrived.put_nowait(Part(index, None, first))
            except Exception as error:  # noqa: BLE001 (the request's own, raised below)
                arrived.put_nowait(error)

        tasks = [asyncio.ensure_future(follow(*one)) for one in enumerate(self.streams)]
        going = len(tasks)
        try:
            while going:
                found = await arrived.get()
                if isinstance(found, Exception):
                    raise found
                going -= found.piece is None
                yield found
        finally:
            for task in tasks:
                task.cancel()

    @property
    def requests(self) -> list[Request]:
        """The requests that the engine decodes."""
        return [stream.stream.request for stream in self.streams]

    def usage(self) -> CompletionUsage:
        """Return the tokens of all replies so far; each prompt counts once."""
        requests = self.requests
        own = requests[:: self.per_prompt]
        prompt = sum(len(request.prompt_token_ids) for request in own)
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
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(request.cached for request in own)
            ),
        )

    def drafted(self, part: Part) -> dict[str, list[bool]]:
        """Return whether each token of a part was drafted, where the request asks for it."""
        if part.piece is None or not self.asked.return_drafted:
            return {}
        return {"drafted": list(part.piece.drafted)}

    def known_logprobs(self, part: Part) -> Sequence[TokenLogprob] | None:
        """Return the log-probabilities of a part's tokens; None without any."""
        if part.piece is None or self.asked.most_likely is None:
            return None
        known = self.requests[part.index].token_logprobs
        return known[part.first : part.first + len(part.piece.token_ids)]

    def logprob_content(self, known: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """Return log-probabilities as chats and responses have them: an object for each token."""
        return [
            {
                **self.token(one.token_id, one.logprob),
                "top_logprobs": [self.token(*pair) for pair in one.top.items()],
            }
            for one in known
        ]

    def token(self, token_id: int, logprob: float) -> dict[str, Any]:
        """Return a token with its text and its bytes."""
        text = self.token_text(token_id)
        return {
            "token": text,
            "bytes": list(token_bytes(self.vlm.tokenizer, token_id)),
            "logprob": logprob,
        }

    def token_text(self, token_id: int) -> str:
        """Return the text of a token by itself."""
        text = self.vlm.tokenizer.decode([token_id])
        assert isinstance(text, str)  # of one list of tokens
        return text


class ChoiceReplies(Replies[ChoicesT]):
    """Replies that are choices: those of chat completions and of completions."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @property
    def per_prompt(self) -> int:
        """The number of replies to each prompt."""
        return self.asked.n

    @abstractmethod
    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        """Return a choice that is finished."""

    @abstractmethod
    def first_change(self, index: int) -> dict[str, Any] | None:
        """Return what a choice of a stream has before its first piece; None for nothing."""

    @abstractmethod
    def changes(self, part: Part) -> Iterator[dict[str, Any]]:
        """Yield what a piece, or its end, brings of a choice of a stream."""

    async def whole(self) -> dict[str, Any]:
        """Return all choices, once they are finished. See `Replies.whole`."""
        replies = await self.finished()
        choices = [self.choice(index, reply) for index, reply in enumerate(replies)]
        if self.asked.return_drafted:
            for choice, reply in zip(choices, replies, strict=True):
                choice["drafted"] = reply.drafted
        found = self.answer(self.whole_object, choices)
        return found | {"usage": self.usage().model_dump(mode="json", exclude_unset=True)}

    async def chunks(self) -> AsyncGenerator[str, None]:
        """Yield a stream's events. See `Replies.chunks`."""
        for index in range(len(self.streams)):
            first = self.first_change(index)
            if first is not None:
                yield self.change(index, first)
        async with aclosing(self.parts()) as parts:
            async for part in parts:
                for change in self.changes(part):
                    yield self.change(part.index, change)
        options = self.asked.stream_options
        if options is not None and options.include_usage:
            found = self.answer(self.chunk_object, [])
            yield event(
                found
                | {"usage": self.usage().model_dump(mode="json")}
                | {"fastvlm": self.acceptance()}
            )
        yield "data: [DONE]\n\n"

    def change(self, index: int, change: dict[str, Any]) -> str:
        """Return the event of a change of one choice."""
        found = self.answer(self.chunk_object, [{"index": index, "finish_reason": None, **change}])
        options = self.asked.stream_options
        if options is not None and options.continuous_usage_stats:
            found["usage"] = self.usage().model_dump(mode="json")
        return event(found)

    def answer(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an answer, or a chunk of one."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.name,
            "choices": choices,
        }

    def finish_reason(self, index: int) -> Any:
        """Return why a reply has ended as the API has it."""
        return "length" if self.requests[index].finish_reason == "length" else "stop"

    def acceptance(self) -> dict[str, Any]:
        """Return how many tokens each cycle of the first choice drafted and accepted."""
        request = self.requests[0]
        return {"proposed_per_cycle": request.proposed, "accepted_per_cycle": request.accepted}


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
