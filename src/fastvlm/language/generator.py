"""What a model's `generate` goes by: the tokens that start and end a reply, and whose they are."""

from __future__ import annotations

from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language.structure import text_decoder


def start_token(model: PreTrainedModel) -> int:
    """Return the token that an encoder-decoder's reply starts with.

    Raises:
        InputError: Neither the model's nor its generation configuration says which.
    """
    settings: list[Any] = [*generation_configs(model), text_decoder(model).config]
    for name in ("decoder_start_token_id", "bos_token_id"):
        for found in settings:
            token = getattr(found, name, None)
            if token is not None:
                return int(token)
    raise InputError(
        f"{type(model).__name__} doesn't say which token a reply starts with; set"
        " generation_config.decoder_start_token_id."
    )


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens that end a model's reply."""
    for config in generation_configs(model):
        ends = config.eos_token_id
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()


def generation_configs(model: PreTrainedModel) -> list[Any]:
    """Return what says how replies are generated, the most particular first.

    A whole language model inside another, as in BLIP-2, has one of its own and goes by that.
    """
    found = [owner.generation_config for owner in (generator_of(model), model)]
    return [config for config in found if config is not None]


def generator_of(model: PreTrainedModel) -> Any:
    """Return the model whose `generate` runs: a whole language model inside another, or itself.

    BLIP-2 and InstructBLIP hand their prompts to the `generate` of the language model in them,
    which goes by its own settings.
    """
    # A bare decoder may have settings, too, but nothing in it reads them.
    inner = getattr(model, "language_model", None)
    return inner if isinstance(inner, GenerationMixin) else model
