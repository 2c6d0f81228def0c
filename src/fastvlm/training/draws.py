"""Drawing the examples of each step, with prompts prepared ahead by workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastvlm.data.workers import prepared
from fastvlm.functional.messages import Message
from fastvlm.training.forcing import TeacherForcing
from fastvlm.training.optimisation import step_random
from fastvlm.training.processes import this_process
from fastvlm.training.replies import Example
from fastvlm.training.schedule import Schedule

Wanted = tuple[int, Sequence[Message]] | None
"""An example's number and messages; None marks a step's end."""


@dataclass(frozen=True, slots=True)
class _Preparation:
    """Prepares what is wanted, maybe in a worker."""

    prepare: Callable[[Sequence[Message]], Any]

    def __call__(self, wanted: Wanted) -> tuple[int, Any] | None:
        return None if wanted is None else (wanted[0], self.prepare(wanted[1]))


class ExampleDraws:
    """Draws a step's examples without replacement.

    Args:
        forcing: Makes the prompts, and keeps them if there is memory.
        examples: The examples.
        batch: Examples in a step; if there are fewer, all are drawn.
    """

    def __init__(self, forcing: TeacherForcing, examples: Sequence[Example], batch: int) -> None:
        self.forcing, self.examples = forcing, examples
        self.size = min(batch, len(examples))
        self._schedule: Schedule | None = None
        self._prepared: Generator[tuple[int, Any] | None] | None = None

    def __call__(self, step: int) -> list[Example]:
        """Return a step's examples; Python's generator must be seeded for the step.

        Raises:
            InputError: An example can't be prepared.
            LostWorkerError: A worker was killed.
        """
        drawn = random.sample(self.examples, self.size)
        schedule = self._schedule
        if schedule is not None and schedule.workers:
            if self._prepared is None:
                self._prepared = prepared(
                    _Preparation(self.forcing.vlm.prompts.prepare),
                    self._wanted(schedule, step),
                    workers=schedule.workers,
                    ahead=self.size,
                )
            # What the step before didn't take had been kept meanwhile.
            self.forcing.prepared.clear()
            while (made := next(self._prepared)) is not None:
                number, inputs = made
                self.forcing.prepared[id(self.examples[number].messages)] = inputs
        return drawn

    @contextmanager
    def ahead(self, schedule: Schedule) -> Iterator[None]:
        """Prepare the examples of coming steps in the schedule's workers, in this context."""
        self._schedule = schedule
        try:
            yield
        finally:
            self._schedule = None
            if self._prepared is not None:
                self._prepared.close()
                self._prepared = None
            self.forcing.prepared.clear()

    def _wanted(self, schedule: Schedule, first: int) -> Iterator[Wanted]:
        """Yield what this process will have to prepare for its share of each step to come."""
        state = this_process()
        share = slice(
            self.size * state.process_index // state.num_processes,
            self.size * (state.process_index + 1) // state.num_processes,
        )
        for step in range(first, schedule.steps):
            generator = step_random(schedule.seed, step)
            generator.getrandbits(63)  # torch's seed
            for number in generator.sample(range(len(self.examples)), self.size)[share]:
                messages = self.examples[number].messages
                if not self.forcing.kept.has(messages):
                    yield number, messages
            yield None
