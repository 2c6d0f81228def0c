"""The thread that makes the engine's steps, and the streams that it feeds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Condition, Thread
from types import TracebackType

from fastvlm.decoding.reply import Piece, Reply, ReplyStream
from fastvlm.serving.errors import ApiError
from fastvlm.serving.images import check_image_tokens
from fastvlm.vlm import VisionLanguageModel

MAX_PREPARING = 4
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
    """

    def __init__(self, stream: ReplyStream, loop: asyncio.AbstractEventLoop) -> None:
        self.stream, self.loop = stream, loop
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

    def fail(self, error: Exception) -> None:
        """End the reply where it stands, with an error."""
        self.stream.close()
        self._hand_on(error)

    def feed(self) -> bool:
        """Hand on what has come, from the engine's thread; return whether the reply has ended."""
        try:
            pieces = self.stream.ready()
        except Exception as error:  # noqa: BLE001 (the request's own error, whatever it is)
            self._hand_on(error)
            return True
        for piece in pieces:
            self._hand_on(piece)
        if self.stream.ended:
            self._hand_on(None)
            return True
        return False

    def _hand_on(self, found: Piece | Exception | None) -> None:
        # The loop is closed when the server stops; nobody reads then.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._arrived.put_nowait, found)


class EngineThread:
    """Makes the steps of a model's engine while there are requests.

    Prompts are prepared, and their images encoded, in a second thread, so that replies that stream
    go on meanwhile.

    Args:
        vlm: The model.
        max_image_tokens: The most visual tokens of a request; None for no limit.
    """

    def __init__(self, vlm: VisionLanguageModel, max_image_tokens: int | None = None) -> None:
        self.vlm, self.max_image_tokens = vlm, max_image_tokens
        self.preparing = asyncio.Semaphore(MAX_PREPARING)
        """Held while a request's images are open, which bounds their memory."""
        self._streams: list[ServedStream] = []
        self._changed = Condition()
        self._error: Exception | None = None
        """Why replies end and requests are refused, if they are."""
        self._ending = False
        self._preparing = ThreadPoolExecutor(1, "fastvlm-prepare")
        self._thread = Thread(target=self._run, name="fastvlm-engine", daemon=True)

    def __enter__(self) -> EngineThread:
        """Start the thread."""
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
        self._preparing.shutdown()

    def stop(self) -> None:
        """End all replies with an error, and refuse further requests."""
        with self._changed:
            self._error = stopping()
            self._changed.notify()

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self.vlm.engine.slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self.vlm.engine.waiting)

    async def submit(self, make: Callable[[], ReplyStream]) -> ServedStream:
        """Return the stream of a request, which has begun.

        Args:
            make: Prepares the request, such as `vlm.stream` with its arguments.

        Raises:
            ApiError: It has too many visual tokens, or the server is stopping.
            FastVlmError: The request is refused.
        """
        loop = asyncio.get_running_loop()
        stream = await loop.run_in_executor(self._preparing, make)
        config = self.vlm.model.config
        image_token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        check_image_tokens(stream.request.inputs, image_token, self.max_image_tokens)
        served = ServedStream(stream, loop)
        stream.start()
        with self._changed:
            if self._error is not None:
                stream.close()
                raise self._error
            self._streams.append(served)
            self._changed.notify()
        return served

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._streams or self._ending)
                if self._error is not None:
                    for stream in self._streams:
                        stream.fail(self._error)
                    self._streams.clear()
                if self._ending:
                    return
                if not self._streams:
                    continue
                streams = list(self._streams)
            if not any(stream.stream.request.finished for stream in streams):
                self.vlm.engine.step()
            ended = [stream for stream in streams if stream.feed()]
            if ended:
                with self._changed:
                    for stream in ended:
                        self._streams.remove(stream)
