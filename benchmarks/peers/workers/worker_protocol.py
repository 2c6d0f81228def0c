"""What a worker is told and answers: JSON, a line each, over its standard input and output.

A worker holds one model in one engine. It is started with an `Order`, answers once that it is
ready, and then answers requests until its input ends. Nothing but the standard library is needed
here, as every worker runs in the environment of its own engine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

ORDINARY = "ordinary"
"""The way that decodes token by token, as the engine does by default."""
PROMPT_LOOKUP_TOKENS = 10
"""The most tokens that prompt lookup drafts, in every engine."""
PROMPT_LOOKUP_NGRAM = 3
"""The longest sequence of tokens that prompt lookup looks for."""
MAX_ERROR_LETTERS = 600
"""An engine's error is quoted up to here."""


@dataclass(frozen=True)
class Order:
    """What a worker loads.

    Args:
        model: The model's directory, as `transformers` wrote it.
        dtype: `float32`, `bfloat16`, `int8` or `int4`: what its weights are held in.
        threads: Threads to compute with.
        ways: The ways of decoding that will be asked for.
        weights: A folder for converted weights, which are kept.
        context: The most tokens of a prompt and its reply together.
        draft: A directory with a draft, for the way that needs one.
    """

    model: str
    dtype: str
    threads: int
    ways: Sequence[str]
    weights: str
    context: int
    draft: str | None = None

    def line(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Decoded:
    """A reply.

    Args:
        token_ids: Its tokens.
        started: When the request was made, in seconds.
        times: When each token was known, in seconds.
        passes: Passes of the model after the prompt's, where the engine says so.
    """

    token_ids: Sequence[int]
    started: float
    times: Sequence[float]
    passes: int | None = None

    def record(self) -> dict[str, Any]:
        """Return what is measured: TTFT, and time per output token after the first, both in ms.

        Raises:
            ValueError: Tokens and times differ in number, or there are fewer than two.
        """
        count = len(self.token_ids)
        if count != len(self.times) or count <= 1:
            raise ValueError(f"{count} tokens came at {len(self.times)} times.")
        found = {
            "token_ids": [int(token) for token in self.token_ids],
            "ttft_ms": 1e3 * (self.times[0] - self.started),
            "tpot_ms": 1e3 * (self.times[-1] - self.times[0]) / (count - 1),
        }
        return found if self.passes is None else {**found, "passes": self.passes}


class Decoder(Protocol):
    """A model in an engine."""

    about: str
    """The engine, its version, and how it was set up."""

    def decode(self, prompt: list[int], max_new_tokens: int, way: str) -> Decoded:
        """Return a greedy reply of exactly so many tokens; end tokens don't end it."""
        ...

    def log_likelihood(self, prompt: list[int], reply: list[int]) -> float:
        """Return the log-likelihood of a reply to a prompt, natural logarithm."""
        ...


def shown(error: BaseException) -> str:
    """Return an error as its engine words it, without what is too long to quote."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MAX_ERROR_LETTERS]


def answers(decoder: Decoder, asked: dict[str, Any]) -> dict[str, Any]:
    """Answer one request, an error of the engine's included."""
    try:
        if "reply" in asked:
            return {"log_likelihood": decoder.log_likelihood(asked["prompt"], asked["reply"])}
        return decoder.decode(asked["prompt"], asked["max_new_tokens"], asked["way"]).record()
    # What an engine can't do is a finding, whatever it raises.
    except Exception as error:  # noqa: BLE001
        return {"error": shown(error)}


def serve(load: Callable[[Order], Decoder]) -> None:
    """Load what the command line orders, and answer requests.

    Args:
        load: Loads a model.
    """
    # Engines print what they like: to the log. The answers have their channel to themselves.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    begun = time.perf_counter()
    try:
        decoder = load(Order(**json.loads(sys.argv[1])))
    except Exception as error:
        say({"error": shown(error)})
        raise
    say({"about": decoder.about, "load_s": time.perf_counter() - begun})
    for line in sys.stdin:
        say(answers(decoder, json.loads(line)))
