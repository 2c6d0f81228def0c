"""The thread that prepares prompts: images of requests that wait for it are encoded together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fastvlm.decoding import Request
from fastvlm.decoding.attempt import attempt
from fastvlm.request_builder import PlannedRequest, RequestBuilder

Plan = Callable[[], PlannedRequest]


class Preparation:
    """Builds requests in a thread of its own, so that replies that stream go on meanwhile.

    Args:
        builder: Builds them.
        most: The most requests that are built at once.
    """

    def __init__(self, builder: RequestBuilder, most: int) -> None:
        self.builder, self.most = builder, most
        self._waiting: deque[tuple[Plan, Future[Request]]] = deque()
        self._thread = ThreadPoolExecutor(1, "fastvlm-prepare")

    async def request(self, plan: Plan) -> Request:
        """Return a request that can be decoded.

        Args:
            plan: Returns what it is made of; called in the thread.

        Raises:
            Exception: The request failed with this error.
        """
        built: Future[Request] = Future()
        self._waiting.append((plan, built))
        self._thread.submit(self._build)
        return await asyncio.wrap_future(built)

    def close(self) -> None:
        """Build what waits, and end the thread."""
        self._thread.shutdown()

    def _build(self) -> None:
        """Build those that wait, of which an earlier call may have taken some."""
        taken: list[tuple[PlannedRequest, Future[Request]]] = []
        while self._waiting and len(taken) < self.most:
            plan, built = self._waiting.popleft()
            if not built.set_running_or_notify_cancel():
                continue
            planned = attempt(plan)
            if isinstance(planned, Exception):
                built.set_exception(planned)
            else:
                taken.append((planned, built))
        requests = self.builder.build([planned for planned, _ in taken])
        for request, (_, built) in zip(requests, taken, strict=True):
            if request.error is not None:
                built.set_exception(request.error)
            else:
                built.set_result(request)
