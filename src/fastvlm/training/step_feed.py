"""What a step draws from a stream of conversations, prepared ahead by workers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import islice
from typing import Generic, TypeVar

from fastvlm.data.conversations import Broken, Conversation
from fastvlm.data.feed import Feed

Made = TypeVar("Made")


class StepFeed(Generic[Made]):
    """Draws what the steps of a run learn from, in the order of a feed.

    Args:
        feed: The conversations; a position that is restored before the first draw is gone on from.
        make: Makes what is learnt of a conversation, whose images are not open yet.
        batch: Conversations that this process takes in a step.
        workers: Processes that prepare conversations ahead of the step that takes them; those of
            a step are held ready. What is learnt is the same for any number.
    """

    def __init__(
        self, feed: Feed, make: Callable[[Conversation], Made | Broken], batch: int, workers: int
    ) -> None:
        self.feed, self.make, self.batch, self.workers = feed, make, batch, workers
        self._prepared: Generator[Made] | None = None

    def draw(self) -> list[Made]:
        """Return what a step learns from; conversations that make nothing are counted as broken.

        Raises:
            InputError: Too many are.
            LostWorkerError: A worker was ended from outside.
        """
        if self._prepared is None:
            self._prepared = self.feed.prepared(self.make, workers=self.workers, ahead=self.batch)
        return [*islice(self._prepared, self.batch)]

    def close(self) -> None:
        """End the workers; what they prepared ahead is prepared again by whoever goes on."""
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None
