"""What fastvlm makes of a tiny model: the tokens of `generate`, a refusal, or something wrong."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.functional.errors import FastVlmError
from fastvlm.language import DecoderInputs, SplitDecoder, capture_decoder_inputs, split_decoder
from fastvlm.language.generator import end_tokens
from tests.language.decoding import decode, strategy
from tests.language.generating import LIMIT, generated
from tests.language.tiny import first_line

STRATEGIES = ("autoregressive", "early-exit", "block", "perfect")
LENGTHS = (7, 4)
"""Tokens of the rows of a batch."""


@dataclass
class Outcome:
    """What fastvlm makes of a model.

    Args:
        result: `equal`, `refused` or `wrong`.
        reason: Why it is refused, or what is wrong.
        adapter: The class that splits its decoder.
        alone: Whether a row of a padded batch has the tokens that it has alone with `generate`,
            whose own padding changes them.
    """

    result: str
    reason: str = ""
    adapter: str = ""
    alone: bool = False


def outcome(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Outcome:
    """Return what fastvlm makes of a model.

    Args:
        model: The model, which generates.
        inputs: A prompt of one row.
    """
    found = Outcome("equal")
    wrong: list[str] = []
    try:
        decoder = split_decoder(model)
        found.adapter = type(decoder).__name__
        wrong += differences(decoder, capture_decoder_inputs(model, inputs), replies(model, inputs))
        both = batch(model, inputs)
        prompts = capture_decoder_inputs(model, both)
        padded = differences(decoder, prompts, replies(model, both))
        if padded and not model.config.is_encoder_decoder:
            rows = [replies(model, alone(both, row))[0] for row in range(len(LENGTHS))]
            found.alone = not differences(decoder, prompts, rows)
        wrong += [] if found.alone else padded
    except FastVlmError as error:
        return Outcome("refused", str(error), found.adapter)
    except Exception as error:  # noqa: BLE001  whatever it raises is wrong
        wrong.append(first_line(error))
    return Outcome("wrong", "; ".join(wrong), found.adapter) if wrong else found


def differences(
    decoder: SplitDecoder, prompts: list[DecoderInputs], expected: list[list[int]]
) -> list[str]:
    """Return what strategies decode otherwise than expected, one text for each.

    Args:
        decoder: The decoder.
        prompts: What they decode together.
        expected: The replies.
    """
    ends = end_tokens(decoder.model)
    wrong = []
    for name in STRATEGIES:
        made = decode(decoder, strategy(name, decoder), prompts, LIMIT, ends)
        found = [request.output_token_ids for request in made]
        if found != expected:
            wrong.append(f"{name}: {found} instead of {expected}")
    return wrong


def batch(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of the prompt and a shorter one, padded where the family pads."""
    tokens, mask = (inputs[name].repeat(2, 1) for name in ("input_ids", "attention_mask"))
    long, short = LENGTHS
    padding = slice(short, None) if model.config.is_encoder_decoder else slice(0, long - short)
    tokens[1, padding], mask[1, padding] = 0, 0
    rest = {name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}
    return {**rest, "input_ids": tokens, "attention_mask": mask}


def alone(both: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return a row of a batch without its padding."""
    own = both["attention_mask"][row].bool()
    return {name: tensor[row : row + 1, own] for name, tensor in both.items()}


def replies(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Return the tokens that transformers generates greedily, each row's up to its end."""
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    made = generated(model, inputs, LIMIT).sequences[:, start:].tolist()
    ends = end_tokens(model)
    return [
        row[: next((place + 1 for place, one in enumerate(row) if one in ends), len(row))]
        for row in made
    ]
