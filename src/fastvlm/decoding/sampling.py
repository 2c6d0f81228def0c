"""Options of sampling, by the names that users know, as `transformers`' own logits processors."""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastvlm.decoding.selection import Selection
from fastvlm.functional.errors import InputError, first_line


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn. Greedy decoding, if no temperature is given.

    Args:
        temperature: Above 0, what logits are divided by before a token is drawn; 0 for greedy.
        top_k: Draw from so many of the likeliest tokens.
        top_p: Draw from the likeliest tokens that together have this probability.
        min_p: Draw from tokens that have at least this share of the likeliest one's probability.
        repetition_penalty: What the logits of tokens that stand in the prompt or the reply are
            divided by (multiplied, where negative); greedy decoding honours it, too.
        seed: Draws the same reply each time.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


def selection_of(prompt: list[int], **options: Unpack[SamplingOptions]) -> Selection:
    """Return how a reply's tokens are chosen.

    Args:
        prompt: The prompt's tokens.
        options: See `SamplingOptions`. Processors follow each other as in `transformers`.

    Raises:
        InputError: An option is out of range, or needs a temperature.
    """
    temperature = options.get("temperature", 0)
    drawing = [name for name in ("top_k", "top_p", "min_p", "seed") if name in options]
    if not temperature and drawing:
        raise InputError(f"{drawing[0]} needs a temperature above 0: without one nothing is drawn.")
    processors = LogitsProcessorList()
    try:
        if options.get("repetition_penalty", 1) != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
        if temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if "top_k" in options:
            processors.append(TopKLogitsWarper(options["top_k"]))
        if "top_p" in options:
            processors.append(TopPLogitsWarper(options["top_p"]))
        if "min_p" in options:
            processors.append(MinPLogitsWarper(options["min_p"]))
    except ValueError as error:
        raise InputError(first_line(error)) from error
    generator = torch.Generator().manual_seed(options["seed"]) if "seed" in options else None
    return Selection(processors, bool(temperature), generator, prompt)
