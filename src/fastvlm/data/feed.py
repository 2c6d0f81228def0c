"""A stream of conversations for training: shuffled, split among processes, resumable."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from fastvlm.data.broken import BrokenRecords
from fastvlm.data.conversations import Broken, Conversation, Record, Records, Shards, opened
from fastvlm.data.workers import prepared
from fastvlm.functional.errors import InputError

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Position:
    """A position in a feed.

    Args:
        epoch: The epoch.
        shard: Shards of the epoch that are finished; 0 for `Records`.
        record: The first record of the current block in its shard.
        done: Records of the block that are finished.
    """

    epoch: int = 0
    shard: int = 0
    record: int = 0
    done: int = 0

    @property
    def begins_epoch(self) -> bool:
        """Whether it is the beginning of an epoch."""
        return not (self.shard or self.record or self.done)


@dataclass(frozen=True, slots=True)
class _Read:
    """A record as it was read, and the position after it; None stands at an epoch's end."""

    record: Record | None
    position: Position


@dataclass(frozen=True, slots=True)
class _Preparation:
    """Makes something of a conversation that was read, maybe in a worker."""

    make: Callable[[Conversation], Any]

    def __call__(self, read: _Read) -> tuple[Any, Position]:
        record = read.record
        made = self.make(record) if isinstance(record, Conversation) else record
        return made, read.position


class Feed:
    """Endless conversations with their images open; broken records are counted and skipped.

    The order depends on the seed and the position alone. `Records` are permuted anew in each epoch.
    For `Shards` the order of the shards is permuted, and records are shuffled within blocks of
    `buffer`, so that a position is a few numbers and resuming reads only one block again.

    Args:
        source: The records.
        seed: The seed of the order; the same in all processes.
        process: This process's number.
        processes: The number of processes that share the source: each record of an epoch goes to
            one of them.
        buffer: Records in a block. Their images are held in encoded form.
        broken: Counts this process's broken records.

    Raises:
        InputError: The process's number is not below `processes`, or a process would have no
            records.
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
        self.position = Position()

    def __iter__(self) -> Iterator[Conversation]:
        """Yield conversations from the position on, their images open.

        Raises:
            InputError: Too many records are broken, or an epoch had no conversation at all.
        """
        return self.prepared(opened)

    def prepared(
        self,
        make: Callable[[Conversation], Made | Broken],
        *,
        workers: int = 0,
        ahead: int = 1,
    ) -> Generator[Made]:
        """Yield the results of a function on the conversations from the position on.

        The feed's position is that of the last result yielded, however much is read ahead.

        Args:
            make: Returns a result for a conversation, whose images are not open yet, or the reason
                why there is none. It must be picklable for workers.
            workers: The number of worker processes, see `fastvlm.data.workers.prepared`.
            ahead: The number of results to prepare ahead.

        Raises:
            InputError: Too many records are broken, or an epoch had no conversation at all.
            LostWorkerError: A worker was killed.
        """
        # Where an epoch is resumed, conversations came before.
        fed = not self.position.begins_epoch
        read = self._read(self.position)
        results = prepared(_Preparation(make), read, workers=workers, ahead=ahead)
        with closing(results):
            for made, position in results:
                if made is None:
                    self.broken.check()
                    if not fed:
                        raise InputError(
                            f"An epoch had no conversation for process {self.process} of"
                            f" {self.processes}: {self.broken.summary()}."
                        )
                    fed = False
                self.position = position
                if made is None:
                    continue
                self.broken.see()
                if isinstance(made, Broken):
                    self.broken.add(made)
                else:
                    fed = True
                    yield made

    def _read(self, position: Position) -> Iterator[_Read]:
        """Yield records from a position on, and None at the end of each epoch."""
        while True:
            for start, size, take in self._blocks(position):
                order = self._shuffled(start, size, "block", start.shard, start.record)
                if isinstance(self.source, Records):
                    order = order[self.process :: self.processes]
                for done, index in enumerate(order[start.done :], start.done + 1):
                    yield _Read(take(index), replace(start, done=done))
            position = Position(position.epoch + 1)
            yield _Read(None, position)

    def _shuffled(self, position: Position, count: int, *place: str | int) -> list[int]:
        order = list(range(count))
        random.Random(f"{self.seed}/{position.epoch}/{place}").shuffle(order)
        return order

    def _blocks(
        self, position: Position
    ) -> Iterator[tuple[Position, int, Callable[[int], Record]]]:
        """Yield what is shuffled as one, from a position on to the end of its epoch.

        A block is where it is read from, its size, and what takes a record out of it.
        """
        if isinstance(self.source, Records):
            yield position, len(self.source), self.source.__getitem__
            return
        shards = self._shuffled(position, len(self.source), "shards")
        # With fewer shards than processes each reads all of them, and keeps its share of records.
        apart = len(shards) >= self.processes
        shards = shards[self.process :: self.processes] if apart else shards
        first, step = (0, 1) if apart else (self.process, self.processes)
        while position.shard < len(shards):
            records = self.source.read(shards[position.shard], position.record)
            while True:
                taken, mine = 0, dict[int, Record]()
                for record in islice(records, self.buffer * step):
                    if taken % step == first:
                        mine[len(mine)] = record
                    taken += 1
                if not taken:
                    break
                # Taken out for good: decoded, an image is ten times as large as encoded.
                yield position, len(mine), mine.pop
                position = replace(position, record=position.record + taken, done=0)
            position = Position(position.epoch, position.shard + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the counts of broken records, in plain types."""
        return {
            **self._plan(),
            **asdict(self.position),
            "broken": self.broken.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position; iterators that have already begun are not affected.

        Raises:
            InputError: The position belongs to another feed.
        """
        for name, value in self._plan().items():
            if state[name] != value:
                raise InputError(
                    f"The position is one of a feed with {name} {state[name]}, but this one has"
                    f" {value}; resume with the same data and options."
                )
        names = ("epoch", "shard", "record", "done")
        self.position = Position(**{name: state[name] for name in names})
        self.broken.load_state_dict(state["broken"])

    def _plan(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "process": self.process,
            "processes": self.processes,
            "buffer": self.buffer,
            "length": len(self.source),
        }
