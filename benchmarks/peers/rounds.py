"""Workers decode the same prompts in turns, and what they answer is kept line by line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.evaluation.measuring import rotated
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_json_lines
from peers.contenders import Contender, Pool, Worker, WorkerError
from peers.workers.worker_protocol import ORDINARY

REFERENCE = "transformers"
"""The engine whose ordinary replies the others are compared with."""
LIKELIHOOD = "likelihood"
"""Where it is noted that an engine doesn't say how likely a reply is."""
WARM_UP_TOKENS = 8
Record = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Args:
        kind: What kind of text it begins.
        token_ids: Its tokens.
    """

    kind: str
    token_ids: list[int]


class Journal:
    """The records of a run, in a file that loses none of them when the run is ended.

    Args:
        file: The file of JSON lines; its first line is the plan.
        plan: What the run measures.
        resumes: Whether to go on with a run that was ended.

    Raises:
        InputError: The run to be resumed had another plan.
    """

    def __init__(self, file: Path, plan: dict[str, Any], *, resumes: bool) -> None:
        self.file, self.plan = file, plan
        self.records: list[Record] = []
        if resumes and file.is_file():
            before, *self.records = read_json_lines(file)
            if before != plan:
                raise InputError(f"{file} is of a run with other settings; leave out --resume.")
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plan) + "\n")

    def add(self, **record: Any) -> None:
        """Keep a record, with the machine's load when it was made."""
        record["load"] = os.getloadavg()[0]
        self.records.append(record)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def find(self, **fields: Any) -> Iterator[Record]:
        """Yield the records that have the fields given."""
        for record in self.records:
            if all(record.get(name) == value for name, value in fields.items()):
                yield record

    def has(self, **fields: Any) -> bool:
        """Return whether there is a record with the fields given."""
        return next(self.find(**fields), None) is not None


@dataclass(frozen=True)
class Measurement:
    """The measurement of one precision.

    Args:
        dtype: The precision.
        prompts: The prompts.
        max_new_tokens: Tokens of every reply.
        journal: Where records are kept.
        say: Told what happens.
    """

    dtype: str
    prompts: Sequence[Prompt]
    max_new_tokens: int
    journal: Journal
    say: Callable[[str], None]

    def run(
        self, contenders: Sequence[Contender], load: Callable[[Contender], Worker], *,
        most: int, rounds: int,
    ) -> None:  # fmt: skip
        """Measure.

        Args:
            contenders: The workers that take turns.
            load: Loads a worker.
            most: The most workers that are loaded at a time.
            rounds: Rounds in which each of them has a turn; the prompts are shared out among them.
        """

        def start(contender: Contender) -> Worker:
            worker = load(contender)
            self._note(contender, about=worker.ready["about"], load_s=worker.ready["load_s"])
            for way in contender.ways:
                # The first reply of all compiles and allocates.
                self._asked(worker, contender, way, self._question(0, way, WARM_UP_TOKENS))
            return worker

        with Pool(start, most) as pool:
            for turn in range(rounds):
                for contender in rotated(contenders, turn):
                    for number in range(turn, len(self.prompts), rounds):
                        for way in rotated(contender.ways, number):
                            self._decode(pool, contender, number, way)
            for contender in contenders:
                if ORDINARY in contender.ways:
                    for number in range(len(self.prompts)):
                        self._score(pool, contender, number)

    def _decode(self, pool: Pool, contender: Contender, number: int, way: str) -> None:
        """Decode a reply, unless that was done before or can't be."""
        done = self.journal.has(**self._key(contender), way=way, prompt=number)
        if done or self._failed(contender, way):
            return
        worker = self._worker(pool, contender)
        if worker is None or self._failed(contender, way):
            return
        asked = self._question(number, way, self.max_new_tokens)
        answer = self._asked(worker, contender, way, asked)
        if answer is not None:
            self._note(contender, way=way, prompt=number, **answer)
            self.say(
                f"{self.dtype}, {contender.engine}, {way}, prompt {number}:"
                f" {1e3 / answer['tpot_ms']:.1f} tokens/s"
            )

    def _score(self, pool: Pool, contender: Contender, number: int) -> None:
        """Ask how likely a worker's weights find the reply of the reference in float32."""
        key = {"engine": REFERENCE, "dtype": "float32", "way": ORDINARY, "prompt": number}
        reply = next(self.journal.find(**key), None)
        done = self.journal.has(**self._key(contender), scored=number)
        if reply is None or done or self._failed(contender, ORDINARY, LIKELIHOOD):
            return
        worker = self._worker(pool, contender)
        if worker is None:
            return
        asked = {"prompt": self.prompts[number].token_ids, "reply": reply["token_ids"]}
        answer = self._asked(worker, contender, LIKELIHOOD, asked)
        if answer is not None:
            self._note(contender, scored=number, tokens=len(asked["reply"]), **answer)

    def _worker(self, pool: Pool, contender: Contender) -> Worker | None:
        """Return a contender's worker; None where it can't load the model, which is noted."""
        try:
            return pool.get(contender)
        except WorkerError as error:
            for way in contender.ways:
                self._note_error(contender, way, error)
            return None

    def _asked(
        self, worker: Worker, contender: Contender, way: str, asked: Record
    ) -> Record | None:
        """Return a worker's answer; None where it can't do that, which is noted."""
        try:
            return worker.ask(asked)
        except WorkerError as error:
            self._note_error(contender, way, error)
            return None

    def _question(self, number: int, way: str, max_new_tokens: int) -> Record:
        prompt = self.prompts[number].token_ids
        return {"prompt": prompt, "max_new_tokens": max_new_tokens, "way": way}

    def _key(self, contender: Contender) -> Record:
        return {"engine": contender.engine, "dtype": self.dtype}

    def _failed(self, contender: Contender, *ways: str) -> bool:
        key = self._key(contender)
        return any("error" in one for way in ways for one in self.journal.find(**key, way=way))

    def _note(self, contender: Contender, **fields: Any) -> None:
        self.journal.add(**self._key(contender), **fields)

    def _note_error(self, contender: Contender, way: str, error: WorkerError) -> None:
        self._note(contender, way=way, error=str(error))
        self.say(f"{self.dtype}, {contender.engine}, {way}: {error}")
