"""How tokens are drawn and where a reply ends, by the names that users know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastvlm.decoding.structured import StructuredOutput
from fastvlm.functional.errors import InputError, shortened
from fastvlm.functional.noise import MAX_SEED

MAX_NEW_TOKENS = 256
"""The default maximum number of tokens in a reply."""
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
MAX_OCCURRENCE_PENALTY = 2.0
"""The largest presence or frequency penalty."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a reply's tokens are chosen, and where it ends.

    None stands for the checkpoint's `generation_config`; what that leaves out is not done. Replies
    are greedy unless a temperature is given here.

    Args:
        temperature: The logits are divided by it before a token is drawn; 0 for greedy decoding.
        top_p: Draw from the most likely tokens that together have this probability.
        top_k: Draw from this many of the most likely tokens.
        min_p: Draw from tokens with at least this share of the most likely token's probability.
        repetition_penalty: The logits of tokens in the prompt or the reply are divided by it
            (multiplied, where negative); it applies to greedy decoding, too.
        presence_penalty: Subtracted from the logits of tokens that are in the reply, from -2 to 2;
            it applies to greedy decoding, too.
        frequency_penalty: Subtracted from the logits of tokens as often as they are in the reply,
            from -2 to 2; it applies to greedy decoding, too.
        logit_bias: What is added to the logits of tokens before anything else is done with them, by
            their ids, from -100 to 100; it applies to greedy decoding, too.
        seed: A sampled reply is a function of model, prompt and seed, whatever the strategy and the
            batch. None for one from torch's default generator, which `torch.manual_seed` and
            `transformers.set_seed` set.
        stop: One or more strings that end the reply. They are not part of it.
        max_new_tokens: The maximum number of tokens in the reply; 256 if nothing sets another.
        logprobs: The number of most likely tokens whose log-probabilities are returned at each
            position, up to 20, beside that of the chosen token; 0 for that alone, None for none.
        structured: What the reply is to look like: a JSON schema, a regex and others. It needs the
            package llguidance.
        min_new_tokens: The minimum number of tokens before what ends the reply: an end token, as in
            `transformers`, or the last token of a stop string.
        ignore_eos: Whether a reply goes on behind an end token, up to `max_new_tokens`.

    Raises:
        InputError: A value is out of range, needs a temperature, or contradicts another.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    max_new_tokens: int | None = None
    logprobs: int | None = None
    structured: StructuredOutput | None = None
    min_new_tokens: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
            ("presence_penalty", -MAX_OCCURRENCE_PENALTY, MAX_OCCURRENCE_PENALTY),
            ("frequency_penalty", -MAX_OCCURRENCE_PENALTY, MAX_OCCURRENCE_PENALTY),
        ):
            value: Any = getattr(self, name)
            if value is not None and not (_is_number(value) and low <= value <= high):
                upper = "" if high == math.inf else f" and at most {high:g}"
                raise InputError(f"{name} is a number of at least {low:g}{upper}; got {value!r}.")
        if self.temperature and self.temperature < torch.finfo(torch.float32).tiny:
            raise InputError(
                f"temperature is 0, or one that float32 holds; got {self.temperature}."
            )
        if self.repetition_penalty == 0 or self.top_p == 0:
            name = "top_p" if self.top_p == 0 else "repetition_penalty"
            raise InputError(f"{name} is above 0; got 0.")
        _check_logit_bias(self.logit_bias)
        for name, low, high in (
            ("top_k", 1, math.inf),
            ("seed", 0, MAX_SEED - 1),
            ("max_new_tokens", 1, math.inf),
            ("logprobs", 0, MAX_LOGPROBS),
            ("min_new_tokens", 0, math.inf),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and low <= value <= high):
                upper = "" if high == math.inf else f" and at most {high}"
                raise InputError(
                    f"{name} is a whole number of at least {low}{upper}; got {value!r}."
                )
        drawing = [n for n in ("top_k", "top_p", "min_p", "seed") if getattr(self, n) is not None]
        if not self.temperature and drawing:
            raise InputError(
                f"{drawing[0]} needs a temperature above 0: without one nothing is drawn."
            )
        several = self.stop is None or isinstance(self.stop, str | list | tuple)
        if not several or any(not isinstance(one, str) or not one for one in self.stop_strings):
            raise InputError(f"stop is strings of at least one character; got {self.stop!r}.")
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise InputError(f"structured is a StructuredOutput; got {shortened(self.structured)}.")
        if (self.min_new_tokens or 0) > (self.max_new_tokens or math.inf):
            raise InputError(
                f"min_new_tokens is at most max_new_tokens, {self.max_new_tokens}; got"
                f" {self.min_new_tokens}."
            )
        if self.ignore_eos and self.structured is not None:
            raise InputError("A reply of a given form ends with it; leave out ignore_eos.")

    @property
    def stop_strings(self) -> list[str]:
        """The strings that end the reply."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def drawn_seed(self) -> int | None:
        """The seed to draw with, a new one if none was given; None where nothing is drawn."""
        if not self.temperature:
            return None
        return new_seed() if self.seed is None else self.seed

    def for_row(self, row: int) -> SamplingParams:
        """Return the parameters of a row of a batch: row r has the seed + r."""
        if self.seed is None or not row:
            return self
        return replace(self, seed=(self.seed + row) % MAX_SEED)


def new_seed() -> int:
    """Return a seed drawn from torch's default generator."""
    return int(torch.randint(2**63 - 1, ()))


def _check_logit_bias(bias: Any) -> None:
    """Refuse what is no bias of tokens.

    Raises:
        InputError: It is none.
    """
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias maps token ids to numbers; got {shortened(bias)}.")
    for token, value in bias.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise InputError(f"logit_bias is by token id; got {shortened(token)}.")
        if not (_is_number(value) and abs(value) <= MAX_LOGIT_BIAS):
            raise InputError(
                f"logit_bias is a number from -{MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g} for each"
                f" token; got {shortened(value)} for {token}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
