"""The thread that makes the engine's steps, and the streams that it feeds."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from threading import Condition, Thread
from types import TracebackType

from fastvlm.decoding.reply import Piece, Reply, ReplyStream
from fastvlm.functional.messages import Prompt, TokenPrompt
from fastvlm.serving.errors import ApiError
from fastvlm.serving.images import check_image_tokens
from fastvlm.serving.preparation import Plan, Preparation
from fastvlm.vlm import VisionLanguageModel

MAX_PREPARING = 8
"""The most requests whose images are open before their prompts are prepared."""


def stopping() -> ApiError:
    """Return what clients of a server that stops are told."""
    return ApiError(
        "The server is stopping; try again in a moment.",
        status=503,
        kind="server_error",
        code="server_stopping",
        headers={"Retry-After": "5"},
    )


class ServedStream:
    """A reply as an event loop sees it: an asynchronous iterator over its pieces.

    Args:
        stream: The stream, whose steps the engine's thread makes.
        loop: The event loop that reads it.
        on_close: Called when the reply is ended where it stands.
        together: Whether what comes of a step is one piece, rather than a piece for each token.
    """

    def __init__(
        self,
        stream: ReplyStream,
        loop: asyncio.AbstractEventLoop,
        on_close: Callable[[], None],
        *,
        together: bool = False,
    ) -> None:
        self.stream, self.loop, self.together = stream, loop, together
        self._on_close = on_close
        self._error: Exception | None = None
        self._arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    @property
    def reply(self) -> Reply:
        """The reply so far."""
        return self.stream.reply

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield the pieces as they come.

        Raises:
            Exception: The request failed with this error.
        """
        while (found := await self._arrived.get()) is not None:
            if isinstance(found, Exception):
                raise found
            yield found

    def close(self) -> None:
        """End the reply where it stands; its slot is free before the next step."""
        self.stream.close()
        self._on_close()

    def fail(self, error: Exception) -> None:
        """End the reply where it stands, with an error, from any thread."""
        # The error first: the loop may look at any time.
        self._error = error
        self.close()

    def feed(self) -> bool:
        """Hand on what has come, in the event loop; return whether the reply has ended."""
        try:
            pieces = self.stream.ready()
        except Exception as error:  # noqa: BLE001 (the request's own error, whatever it is)
            self._arrived.put_nowait(error)
            return True
        if self.together and pieces:
            pieces = [Piece.joined(pieces)]
        for piece in pieces:
            self._arrived.put_nowait(piece)
        if self.stream.ended:
            self._arrived.put_nowait(self._error)
            return True
        return False


class EngineThread:
    """Makes the steps of a model's engine while there are requests.

    Prompts are prepared, and their images encoded, in a second thread, so that replies that stream
    go on meanwhile. Text is made of tokens in the event loop, which is told once a step: threads
    that hand much to each other wait for each other.

    Args:
        vlm: The model.
        max_image_tokens: The most visual tokens of a request; None for no limit.
    """

    def __init__(self, vlm: VisionLanguageModel, max_image_tokens: int | None = None) -> None:
        self.vlm, self.max_image_tokens = vlm, max_image_tokens
        self.preparing = asyncio.Semaphore(MAX_PREPARING)
        """Held while a request's images are open, which bounds their memory."""
        self.max_characters = vlm.engine.decoder.context * longest_token(vlm)
        """Texts of more have more tokens than the model's context, and needn't be made into them:
        that takes a second for a million characters, in which no other prompt is prepared."""
        self._streams: list[ServedStream] = []
        self._changed = Condition()
        self._error: Exception | None = None
        """Why replies end and requests are refused, if they are."""
        self._ending = False
        self._preparation = Preparation(vlm.builder, MAX_PREPARING)
        self._thread = Thread(target=self._run, name="fastvlm-engine", daemon=True)

    def __enter__(self) -> EngineThread:
        """Start the thread."""
        # What there is by now stays: to look through it for garbage takes a fifth of a second, in
        # which no token comes.
        gc.collect()
        gc.freeze()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread; replies that are not finished end with an error."""
        with self._changed:
            self._error = self._error or stopping()
            self._ending = True
            self._changed.notify()
        self._thread.join()
        self._preparation.close()

    def stop(self) -> None:
        """End all replies with an error, and refuse further requests."""
        with self._changed:
            self._error = stopping()
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether the thread makes steps: it has been started, and has not ended."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self.vlm.engine.slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self.vlm.engine.waiting)

    @property
    def unfinished(self) -> int:
        """Requests that have begun and not ended: one on its way to its slot counts too."""
        with self._changed:
            return sum(not stream.stream.request.finished for stream in self._streams)

    def check_length(self, prompt: Prompt) -> None:
        """Refuse a prompt that is far too long.

        Raises:
            ApiError: It has more characters than its tokens could have.
        """
        characters = length_of(prompt)
        if characters > self.max_characters:
            raise ApiError(
                f"The prompt has {characters:,} characters, but the model's context is"
                f" {self.vlm.engine.decoder.context:,} tokens.",
                code="context_length_exceeded",
            )

    async def submit(self, plan: Plan, *, together: bool = False) -> ServedStream:
        """Return the stream of a request, which has begun.

        Args:
            plan: Returns what the request is made of: `vlm.planned_request` with its arguments.
            together: Whether what comes of a step is one piece, rather than a piece for each token.

        Raises:
            ApiError: It has too many visual tokens, or the server is stopping.
            FastVlmError: The request is refused.
        """
        loop = asyncio.get_running_loop()
        request = await self._preparation.request(plan)
        stream = ReplyStream(self.vlm.engine, request, self.vlm.tokenizer)
        config = self.vlm.model.config
        image_token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        check_image_tokens(stream.request.inputs, image_token, self.max_image_tokens)
        served = ServedStream(stream, loop, partial(self._tell, loop), together=together)
        stream.start()
        with self._changed:
            if self._error is not None:
                stream.close()
                raise self._error
            self._streams.append(served)
            self._changed.notify()
        if stream.request.finished:
            # It was refused, and no step follows.
            self._tell(loop)
        return served

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                streams, ending, error = list(self._streams), self._ending, self._error
            if error is not None:
                for stream in streams:
                    if not stream.stream.request.finished:
                        stream.fail(error)
            if ending:
                return
            self.vlm.engine.step()
            for loop in {stream.loop for stream in streams}:
                self._tell(loop)

    def _has_work(self) -> bool:
        """Return whether there is a step to make, or something to end."""
        return self._ending or any(not stream.stream.request.finished for stream in self._streams)

    def _tell(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let an event loop look for what has come, from any thread."""
        # The loop is closed when the server stops; nobody reads then.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._feed, loop)

    def _feed(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand on what has come, in the event loop that reads it."""
        with self._changed:
            streams = [stream for stream in self._streams if stream.loop is loop]
        ended = [stream for stream in streams if stream.feed()]
        if ended:
            with self._changed:
                for stream in ended:
                    self._streams.remove(stream)


def longest_token(vlm: VisionLanguageModel) -> int:
    """Return the most characters that a token stands for."""
    return max(map(len, vlm.tokenizer.get_vocab()))


def length_of(prompt: Prompt) -> int:
    """Return the characters of a prompt's text."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, TokenPrompt):
        return 0
    contents = [turn["content"] for turn in prompt]
    parts = [
        part
        for content in contents
        for part in ([{"text": content}] if isinstance(content, str) else content)
    ]
    return sum(len(part.get("text", "")) for part in parts)
