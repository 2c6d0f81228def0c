"""The replies of transformers' own generate to a text prompt, of any class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.language.tiny import first_line

LIMIT = 12
SPEAKING = {"qwen2_5_omni", "qwen3_omni_moe"}


class GenerateError(Exception):
    """A class that transformers itself doesn't generate with from a text prompt."""


def varied(model: PreTrainedModel) -> int:
    """Return how many different tokens a model's reply has, or 0 where it has none."""
    try:
        return len(set(expected(model, prompt(model), LIMIT)))
    except GenerateError:
        return 0


def prompt(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a text prompt: what an encoder reads, where there is one."""
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "input_ids": torch.randint(30, 60, (1, 7), generator=generator),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
    }
    if model.config.model_type == "udop":  # its encoder asks where on a page the words stand
        inputs["bbox"] = torch.arange(28, dtype=model.dtype).view(1, 7, 4) / 28
    return inputs


def generated(model: PreTrainedModel, inputs: dict[str, Tensor], limit: int) -> Any:
    """Return what transformers generates greedily.

    Raises:
        GenerateError: It doesn't.
    """
    made: Any = model
    options: dict[str, Any] = {}
    if model.config.model_type in SPEAKING:  # they would speak, and count the words apart
        options = {"generation_mode": "text", "thinker_max_new_tokens": limit}
    try:
        with torch.no_grad():
            return made.generate(
                **inputs,
                max_new_tokens=limit,
                do_sample=False,
                num_beams=1,
                **options,
                return_dict_in_generate=True,
                output_logits=True,
            )
    except Exception as error:
        said = f"transformers itself doesn't generate: {first_line(error)}"
        raise GenerateError(said) from error


def expected(model: PreTrainedModel, inputs: dict[str, Tensor], limit: int) -> list[int]:
    """Return the tokens that transformers generates greedily.

    Raises:
        GenerateError: It doesn't.
    """
    return new_tokens(model, inputs, generated(model, inputs, limit))


def new_tokens(model: PreTrainedModel, inputs: dict[str, Tensor], out: Any) -> list[int]:
    """Return the tokens that `generate` added."""
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    if any(logits.isnan().any() for logits in out.logits or ()):
        raise GenerateError("The logits aren't numbers.")
    return out.sequences[0, start:].tolist()
