"""Conversations for a run: shuffled, shared among processes, and resumed where they stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from fastvlm.data.broken import BrokenRecords
from fastvlm.data.conversations import Broken, Conversation, Record, Records, Shards, opened
from fastvlm.functional.errors import InputError


class Feed:
    """Endless conversations with their pictures open; broken records are counted and passed over.

    What is fed depends on the seed and the position alone. `Records` are permuted anew in each
    epoch. Of `Shards` the order is permuted, and records are shuffled within blocks of `buffer`, so
    that a position is a few numbers and resuming reads one block again.

    Args:
        source: What is fed.
        seed: Decides the order; the same in all processes.
        process: This process's number.
        processes: Processes that share the source: no record goes to two of them in an epoch.
        buffer: Records of a block. Their pictures are held as they are encoded.
        broken: Counts this process's broken records.

    Raises:
        InputError: The process's number is not below `processes`, or a process would have nothing.
    """

    def __init__(
        self,
        source: Records | Shards,
        *,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        buffer: int = 1024,
        broken: BrokenRecords | None = None,
    ) -> None:
        if not 0 <= process < processes:
            raise InputError(f"A process's number lies below {processes}; got {process}.")
        if buffer < 1:
            raise InputError(f"A block has at least one record; got {buffer}.")
        if isinstance(source, Records) and len(source) < processes:
            raise InputError(f"There are {len(source)} records for {processes} processes.")
        self.source, self.seed, self.buffer = source, seed, buffer
        self.process, self.processes = process, processes
        self.broken = BrokenRecords() if broken is None else broken
        self.epoch = self.shard = self.record = self.done = 0

    def __iter__(self) -> Iterator[Conversation]:
        """Yield conversations from the position on.

        Raises:
            InputError: Too many records are broken, or an epoch had no conversation at all.
        """
        while True:
            # Where an epoch is resumed, conversations came before.
            fed = 1 if self.shard or self.record or self.done else 0
            for size, take in self._blocks():
                order = self._shuffled(size, "block", self.shard, self.record)
                if isinstance(self.source, Records):
                    order = order[self.process :: self.processes]
                for index in order[self.done :]:
                    self.done += 1
                    self.broken.see()
                    record = take(index)
                    if isinstance(record, Conversation):
                        record = opened(record)
                    if isinstance(record, Broken):
                        self.broken.add(record)
                    else:
                        fed += 1
                        yield record
            self.broken.check()
            if not fed:
                raise InputError(
                    f"An epoch had no conversation for process {self.process} of {self.processes}:"
                    f" {self.broken.summary()}."
                )
            self.epoch += 1
            self.shard = self.record = self.done = 0

    def _shuffled(self, count: int, *place: str | int) -> list[int]:
        order = list(range(count))
        random.Random(f"{self.seed}/{self.epoch}/{place}").shuffle(order)
        return order

    def _blocks(self) -> Iterator[tuple[int, Callable[[int], Record]]]:
        """Yield what is shuffled as one, from the position on, and move the position after each.

        A block is its size and what takes a record out of it.
        """
        if isinstance(self.source, Records):
            yield len(self.source), self.source.__getitem__
            return
        shards = self._shuffled(len(self.source), "shards")
        # With fewer shards than processes each reads all of them, and keeps its share of records.
        apart = len(shards) >= self.processes
        shards = shards[self.process :: self.processes] if apart else shards
        first, step = (0, 1) if apart else (self.process, self.processes)
        while self.shard < len(shards):
            records = self.source.read(shards[self.shard], self.record)
            while True:
                taken, mine = 0, dict[int, Record]()
                for record in islice(records, self.buffer * step):
                    if taken % step == first:
                        mine[len(mine)] = record
                    taken += 1
                if not taken:
                    break
                # Taken out for good: decoded, a picture is ten times as large as encoded.
                yield len(mine), mine.pop
                self.record += taken
                self.done = 0
            self.shard, self.record = self.shard + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what was counted, in plain types."""
        return {
            **self._plan(),
            "epoch": self.epoch,
            "shard": self.shard,
            "record": self.record,
            "done": self.done,
            "broken": self.broken.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; what iterates already does not notice.

        Raises:
            InputError: It is the position of another feed.
        """
        for name, value in self._plan().items():
            if state[name] != value:
                raise InputError(
                    f"The position is one of a feed with {name} {state[name]}, but this one has"
                    f" {value}; resume with the same data and options."
                )
        self.epoch, self.shard = state["epoch"], state["shard"]
        self.record, self.done = state["record"], state["done"]
        self.broken.load_state_dict(state["broken"])

    def _plan(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "process": self.process,
            "processes": self.processes,
            "buffer": self.buffer,
            "length": len(self.source),
        }
