"""The server's endpoints."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from fastvlm.decoding.strategy_factory import WITH_DRAFT, WITHOUT_DRAFT
from fastvlm.functional.errors import FastVlmError, InputError
from fastvlm.serving.chat import ChatReplies
from fastvlm.serving.completions import CompletionReplies, CompletionRequest
from fastvlm.serving.engine_thread import EngineThread
from fastvlm.serving.errors import (
    SERVER_ERROR,
    ApiError,
    api_error,
    on_error,
    on_http_error,
    on_invalid,
)
from fastvlm.serving.kept_replies import KeptReplies
from fastvlm.serving.lifecycle import Lifecycle, busy
from fastvlm.serving.limits import Limits, read_keys
from fastvlm.serving.metrics import Metrics
from fastvlm.serving.next_draft import DraftWatch
from fastvlm.serving.protocol import ChatRequest
from fastvlm.serving.remote_images import allowed_hosts
from fastvlm.serving.replies import Replies
from fastvlm.serving.request_log import RequestLog, note_usage
from fastvlm.serving.responses import ResponseReplies
from fastvlm.serving.responses_protocol import ResponsesRequest
from fastvlm.serving.settings import ServerSettings, listed
from fastvlm.serving.tokenization import DetokenizeRequest, TokenizeRequest
from fastvlm.vlm import VisionLanguageModel

LOGGER = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
"""The page's files."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}


class Server:
    """A model behind OpenAI's API.

    Args:
        vlm: The model.
        name: Its name in the API.
        settings: How it runs.
        draft: The draft's directory; None where there is none to look for a new one in.

    Raises:
        InputError: The file of API keys can't be read, or a host of images is none.
        StorageError: The folder for replies can't be made.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        name: str,
        settings: ServerSettings,
        draft: Path | None = None,
    ) -> None:
        self.vlm, self.name, self.settings = vlm, name, settings
        allowed_hosts(settings.image_hosts)
        self.keys = read_keys(settings.api_key_file)
        self.engine = EngineThread(vlm, settings.max_image_tokens)
        self.metrics = Metrics(self.engine, name)
        self.created = int(time.time())
        self.beginning: set[Replies[Any]] = set()
        """Those that were let in and whose prompts are not all prepared."""
        self.kept = None
        if settings.keep_replies is not None:
            self.kept = KeptReplies(vlm, settings.keep_replies)
        self.watch = None
        if settings.draft_refresh and draft is not None:
            self.watch = DraftWatch(vlm, draft, settings.draft_refresh)

    def app(self) -> Any:
        """Return the application, as an ASGI server runs it."""
        life = Lifecycle(lambda: self, self.settings)
        life.server = self
        return application(life, self.settings)

    def inner(self) -> Any:
        """Return the endpoints, behind what refuses requests before them."""
        app = FastAPI(title="fastvlm", docs_url=None, redoc_url=None)
        app.add_exception_handler(ApiError, on_error)
        app.add_exception_handler(FastVlmError, on_error)
        app.add_exception_handler(TimeoutError, on_error)
        app.add_exception_handler(RequestValidationError, on_invalid)
        app.add_exception_handler(HTTPException, on_http_error)
        app.add_exception_handler(Exception, on_error)
        app.get("/health")(self.health)
        app.get("/ready")(self.health)
        app.get("/metrics")(self.read_metrics)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.complete)
        app.post("/v1/responses")(self.respond)
        app.post("/tokenize")(self.tokenize)
        app.post("/detokenize")(self.detokenize)
        if PAGE.is_dir():
            app.get("/", include_in_schema=False)(self.page)
            app.mount("/static", StaticFiles(directory=PAGE))
        limits = self.settings.max_body_bytes, self.settings.body_seconds
        return Limits(app, self.keys, *limits)

    async def health(self) -> dict[str, str]:
        """Say that the server answers and the model is loaded."""
        return {"status": "ok"}

    async def read_metrics(self) -> Response:
        """Return the metrics as Prometheus reads them."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        """Return the page."""
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    async def models(self) -> dict[str, Any]:
        """Return the one model that is served."""
        return {"object": "list", "data": [self.card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """Return a model by its name.

        Raises:
            ApiError: It is another.
        """
        self.check_name(name)
        return self.card()

    def card(self) -> dict[str, Any]:
        """Return what clients are told of the model."""
        sizes: list[int] | None = None
        with suppress(InputError):
            own = self.vlm.image_size
            sizes = [size for size in (own // 4, own // 2, own, 2 * own) if size % 64 == 0 and size]
        strategies = ["autoregressive", "early-exit", "prompt-lookup", "layer-skip"]
        drafts = self.vlm.network is not None
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fastvlm",
            "fastvlm": {
                "strategies": [*strategies[:1], "imitation", "cascade", *strategies[1:]]
                if drafts
                else strategies,
                "default_strategy": WITH_DRAFT if drafts else WITHOUT_DRAFT,
                "image_sizes": sizes,
                "images": self.vlm.prompts.shows_images,
                "max_images": self.settings.max_images,
            },
        }

    def check_name(self, name: str | None) -> None:
        """Refuse a model that isn't served.

        Raises:
            ApiError: It isn't.
        """
        if name is not None and name != self.name:
            raise ApiError(
                f"The model {name!r} is not served here; there is {self.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def chat(self, asked: ChatRequest, http: Request) -> Any:
        """Answer a dialogue. See `answer`."""
        return await self.answer(ChatReplies(asked, self.name, self.engine, self.settings), http)

    async def complete(self, asked: CompletionRequest, http: Request) -> Any:
        """Answer prompts without a chat template. See `answer`."""
        replies = CompletionReplies(asked, self.name, self.engine, self.settings)
        return await self.answer(replies, http)

    async def respond(self, asked: ResponsesRequest, http: Request) -> Any:
        """Answer a dialogue as the Responses API has it. See `answer`."""
        replies = ResponseReplies(asked, self.name, self.engine, self.settings)
        return await self.answer(replies, http)

    async def tokenize(self, asked: TokenizeRequest) -> dict[str, Any]:
        """Return a prompt's tokens.

        Raises:
            ApiError: The request is refused.
            FastVlmError: The model refuses it.
        """
        self.check_name(asked.model)
        return await asked.answer(self.vlm, self.settings)

    async def detokenize(self, asked: DetokenizeRequest) -> dict[str, Any]:
        """Return the text of tokens.

        Raises:
            ApiError: The request is refused.
        """
        self.check_name(asked.model)
        return await asked.answer(self.vlm)

    async def answer(self, replies: Replies[Any], http: Request) -> Any:
        """Answer a request with its replies, whole or as a stream of server-sent events.

        Raises:
            ApiError: The request is refused, or the server is busy.
            FastVlmError: The model refuses it.
            TimeoutError: It takes too long.
        """
        self.check_name(replies.asked.model)
        self.check_room(replies.to_begin)
        self.beginning.add(replies)
        try:
            async with asyncio.timeout(self.settings.request_seconds), self.engine.preparing:
                await replies.begin()
        finally:
            self.beginning.remove(replies)
        if replies.asked.stream:
            return StreamingResponse(
                self.observed(replies),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        watch = asyncio.ensure_future(gone(http, replies))
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                return await replies.whole()
        finally:
            watch.cancel()
            self.finish(replies)

    async def observed(self, replies: Replies[Any]) -> AsyncIterator[str]:
        """Yield a stream's events, within a time, and count it when it has ended."""
        try:
            async with (
                asyncio.timeout(self.settings.request_seconds),
                aclosing(replies.chunks()) as chunks,
            ):
                async for chunk in chunks:
                    yield chunk
        except Exception as error:
            # The answer has begun: what is left is an event.
            if api_error(error).status == SERVER_ERROR:
                LOGGER.exception("A stream has failed.")
            yield replies.failure(error)
        finally:
            self.finish(replies)

    def finish(self, replies: Replies[Any]) -> None:
        """Free what replies still hold, and count them."""
        replies.close()
        for request in replies.requests:
            self.metrics.observe(request)
            if self.kept is not None:
                self.kept.add(request)
        note_usage(replies.usage(), [request.finish_reason for request in replies.requests])

    def check_room(self, number: int) -> None:
        """Refuse requests that too many others wait before, or that ask for too many replies.

        Raises:
            ApiError: They do.
        """
        most = self.vlm.engine.max_slots + self.settings.max_waiting
        if number > most:
            raise ApiError(f"A request has at most {most} replies here; got {number}.")
        taken = self.engine.unfinished + sum(one.to_begin for one in self.beginning)
        if taken + number > most:
            raise busy()


def application(life: Lifecycle, settings: ServerSettings) -> Any:
    """Return what an ASGI server runs.

    Args:
        life: What answers, once it has a model.
        settings: How it runs.
    """
    app: Any = life
    if origins := listed(settings.cors_origins):
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return RequestLog(app)


async def gone(http: Request, replies: Replies[Any]) -> None:
    """End replies once their client has gone away."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.1)
    replies.close()
