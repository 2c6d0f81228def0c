"""What `transformers` says of generating: a checkpoint's own settings, processors, criteria."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process as processing
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from fastvlm.decoding.sampler import LogitsProcessor, Sampler
from fastvlm.decoding.sampling_params import MAX_NEW_TOKENS, SamplingParams
from fastvlm.functional.errors import InputError, first_line
from fastvlm.language.generator import generator_of

STATEFUL_PROCESSORS = (
    processing.AlternatingCodebooksLogitsProcessor,
    processing.BarkEosPrioritizerLogitsProcessor,
    processing.ClassifierFreeGuidanceLogitsProcessor,
    processing.DiaClassifierFreeGuidanceLogitsProcessor,
    processing.DiaEOSChannelFilterLogitsProcessor,
    processing.DiaEOSDelayPatternLogitsProcessor,
    processing.SynthIDTextWatermarkLogitsProcessor,
    processing.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    processing.WhisperNoSpeechDetection,
    processing.WhisperTimeStampLogitsProcessor,
)
"""Processors of `transformers` that keep a state, or don't work on text."""
PER_ROW_PROCESSORS = (
    processing.EncoderNoRepeatNGramLogitsProcessor,
    processing.EncoderRepetitionPenaltyLogitsProcessor,
    processing.PrefixConstrainedLogitsProcessor,
)
"""Processors that treat each row of a batch in its own way."""
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "min_p")
"""Settings that apply to sampled replies only."""


def is_stateless(processor: LogitsProcessor) -> bool:
    """Return whether a processor gives the same scores for the same tokens, however it is called.

    `transformers`' own do, but for those that remember; any other says so with an attribute
    `stateless = True`. Whether a user's object remembers something can't be found out by trying.
    """
    if isinstance(processor, processing.PrefixConstrainedLogitsProcessor):
        # What it allows is a user's own function.
        return getattr(processor._prefix_allowed_tokens_fn, "stateless", False) is True
    if type(processor).__module__ == processing.__name__:
        return not isinstance(processor, STATEFUL_PROCESSORS)
    return getattr(processor, "stateless", False) is True


def settings_of(model: PreTrainedModel, params: SamplingParams) -> GenerationConfig:
    """Return a checkpoint's generation settings, overridden by the caller's.

    Raises:
        InputError: They ask for something unsupported, such as beam search or classifier-free
            guidance.
    """
    config: Any = copy.deepcopy(generator_of(model).generation_config)
    config.do_sample = bool(params.temperature)
    for name in SAMPLING_SETTINGS if config.do_sample else ():
        value = getattr(params, name)
        if value is not None:
            setattr(config, name, value)
    if params.repetition_penalty is not None:
        config.repetition_penalty = params.repetition_penalty
    if params.min_new_tokens is not None:
        config.min_new_tokens = params.min_new_tokens
    if params.max_new_tokens is not None:
        config.max_new_tokens, config.max_length = params.max_new_tokens, None
    for name, usual in (("num_beams", 1), ("guidance_scale", 1), ("num_return_sequences", 1)):
        value = getattr(config, name, None)
        if value not in (None, usual):
            raise InputError(
                f"The checkpoint's generation_config has {name}={value}, which fastvlm can't do;"
                f" set model.generation_config.{name} = {usual}."
            )
    return config


def fit_length(config: GenerationConfig, prompt_length: int) -> int:
    """Return the maximum number of tokens in a reply, and set the lengths that processors read.

    Args:
        config: The settings.
        prompt_length: Tokens of the prompt.

    Raises:
        InputError: The checkpoint's `max_length`, which counts the prompt, leaves no room.
    """
    settings: Any = config
    if settings.max_new_tokens is None and settings.max_length is not None:
        settings.max_new_tokens = settings.max_length - prompt_length
        if settings.max_new_tokens < 1:
            raise InputError(
                f"The prompt has {prompt_length} tokens, and the checkpoint's generation_config a"
                f" max_length of {settings.max_length} with the reply; give max_new_tokens."
            )
    elif settings.max_new_tokens is None:
        settings.max_new_tokens = MAX_NEW_TOKENS
    settings.max_length = prompt_length + settings.max_new_tokens
    return int(settings.max_new_tokens)


def processors_of(
    model: PreTrainedModel, config: GenerationConfig, prompt: Sequence[int], device: torch.device
) -> list[LogitsProcessor]:
    """Return the logits processors that `generate` would use for a prompt.

    Args:
        model: The model.
        config: The generation settings.
        prompt: The tokens that processors see before the reply.
        device: The device of the logits.

    Raises:
        InputError: A setting is out of range, or needs a processor that can't be used with drafts.
    """
    generator = generator_of(model)
    row = torch.tensor([list(prompt)], device=device)
    try:
        generator._prepare_special_tokens(config, True, device=device)
        found: list[LogitsProcessor] = generator._get_logits_processor(
            config, row.shape[1], encoder_input_ids=row, device=device
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"The sampling options are refused: {first_line(error)}.") from error
    for processor in found:
        if not is_stateless(processor):
            raise InputError(
                f"The checkpoint's generation_config needs {type(processor).__name__}, which"
                " remembers what it has seen and can't judge drafted tokens; take it out of"
                " model.generation_config."
            )
    return found


def stopper(
    criteria: StoppingCriteriaList,
    prompt: Sequence[int],
    device: torch.device,
    sampler: Sampler | None = None,
) -> Callable[[list[int], list[Tensor]], bool] | None:
    """Return a function that applies stopping criteria of `transformers` after each token of a row.

    The token limit and end tokens are left to the engine. None if there are no other criteria.

    Args:
        criteria: The criteria that `generate` has assembled.
        prompt: The tokens before the reply.
        device: The device of the tokens.
        sampler: Processes the logits that criteria are given as scores, where `generate` returns
            scores; None for no scores.
    """
    others = StoppingCriteriaList(
        one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)
    )
    if not others:
        return None
    scores: list[Tensor] = []

    def stops(reply: list[int], logits: list[Tensor]) -> bool:
        tokens = torch.tensor([[*prompt, *reply]], device=device)
        if sampler is None:
            return bool(others(tokens, None)[0])
        scores.extend(
            sampler.apply_processors(reply[:place], logits[place])[None]
            for place in range(len(scores), len(logits))
        )
        known: Any = tuple(scores)
        return bool(others(tokens, known)[0])

    return stops
