"""`model.generate(..., custom_generate=fastvlm.speculative(draft))`: one changed argument."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process as processing
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import (
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)

from fastvlm.decoding import Engine, Request, Sampler, Strategy
from fastvlm.decoding.generation_config import PER_ROW_PROCESSORS, is_stateless, stopper
from fastvlm.decoding.processors import LogitsProcessor
from fastvlm.decoding.sampling_params import new_seed
from fastvlm.decoding.strategy_factory import STRATEGY_OPTIONS, WITH_DRAFT, StrategyFactory
from fastvlm.drafting import ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.functional.errors import InputError
from fastvlm.functional.noise import MAX_SEED
from fastvlm.functional.options import refuse_unknown
from fastvlm.language import capture_decoder_inputs, split_decoder
from fastvlm.runtimes import draft_runner_of


@dataclass(frozen=True, slots=True)
class Target:
    """The engine and the strategy of a model that was seen before."""

    engine: Engine
    strategy: Strategy


class Speculative:
    """A decoding method for `transformers`' `generate`, for any number of models and threads.

    See `speculative`. Concurrent calls for the same model share the engine's batch.

    Args:
        draft: A draft's directory, or the network; None for strategies that need none.
        strategy: The strategy's name.
        options: The strategy's options.
    """

    def __init__(
        self, draft: str | Path | ImitationNetwork | None, strategy: str, options: dict[str, Any]
    ) -> None:
        self.draft, self.strategy, self.options = draft, strategy, options
        self._targets: WeakKeyDictionary[PreTrainedModel, Target] = WeakKeyDictionary()
        self._lock = Lock()

    def target(self, model: PreTrainedModel) -> Target:
        """Return the engine and the strategy of a model, made at the first call.

        Raises:
            CheckpointError: The draft can't be read, or can't draft for the model.
            InputError: The model's family is not supported, or an option is out of range.
        """
        with self._lock:
            if model not in self._targets:
                decoder, network = split_decoder(model), self.draft
                if isinstance(network, str | Path):
                    network = load_draft(network, model)
                decoder.ahead = draft_runner_of(decoder)
                strategy = StrategyFactory(decoder, network).make(self.strategy, **self.options)
                self._targets[model] = Target(Engine(decoder), strategy)
            return self._targets[model]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: processing.LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput:
        """Decode what `generate` has prepared.

        Args:
            model: The model whose `generate` was called.
            input_ids: (batch, length).
            logits_processor: The logits processors that `generate` has assembled.
            stopping_criteria: The stopping criteria that `generate` has assembled.
            generation_config: The generation settings.
            model_kwargs: The model's further inputs, such as `pixel_values`.

        Returns:
            (batch, length) tokens with the prompt; with `return_dict_in_generate` an output object.

        Raises:
            InputError: The settings ask for beams, attentions, hidden states or a cache that is not
                empty, none of which is supported.
        """
        # transformers hands a decoding method of others all but the streamer, which would wait for
        # tokens for ever.
        streamer = sys._getframe(1).f_locals.get("streamer")
        check_supported(generation_config)
        # Whose fields and methods depend on what `generate` was given and on the model's class.
        config: Any = generation_config
        unfit = first_unfit(logits_processor, len(input_ids))
        if unfit is not None:
            warnings.warn(
                f"{unfit} may remember what it has seen, so it can't judge drafted tokens that may"
                " be rejected: this reply is decoded without drafts. If it depends on nothing but"
                " its arguments, say so with an attribute `stateless = True`.",
                stacklevel=3,
            )
            ordinary: Any = model
            return ordinary._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=streamer,
                **model_kwargs,
            )
        target = self.target(model)
        # The stubs take a model's methods for its buffers.
        prepare: Any = model.prepare_inputs_for_generation
        inputs = prepare(input_ids, is_first_iteration=True, **model_kwargs)
        ends = config._eos_token_tensor
        whole = config.return_dict_in_generate
        shows = bool(whole and config.output_scores)
        seed = new_seed() if config.do_sample else None
        requests = []
        for row, (prompt, seen) in enumerate(
            zip(capture_decoder_inputs(model, inputs), input_ids.tolist(), strict=True)
        ):
            own = None if seed is None else (seed + row) % MAX_SEED
            sampler = Sampler(for_row(logits_processor, row), own, seen)
            requests.append(
                Request(
                    prompt,
                    target.strategy,
                    int(config.max_length) - input_ids.shape[1],
                    sampler,
                    frozenset() if ends is None else frozenset(ends.tolist()),
                    stops=stopper(
                        stopping_criteria, seen, input_ids.device, sampler if shows else None
                    ),
                    keeps_logits=bool(shows or (whole and config.output_logits)),
                )
            )
        if streamer is not None:
            # As `generate`, which streams a single row.
            requests[0].on_token = lambda token: streamer.put(torch.tensor([token]))
        for request in target.engine.run(requests):
            if request.error is not None:
                raise request.error
        if streamer is not None:
            streamer.end()
        return output(model, input_ids, requests, config)


def speculative(
    draft: str | Path | ImitationNetwork | None = None,
    *,
    strategy: str | None = None,
    **options: Any,
) -> Speculative:
    """Return a decoding method for `transformers`' `generate`: identical output, lower latency.

        model.generate(**inputs, custom_generate=fastvlm.speculative("path/to/draft"))

    What `generate` prepares is supported: logits processors, stopping criteria, sampling, several
    rows, a streamer, `return_dict_in_generate`. A custom processor is used with drafts if it has an
    attribute `stateless = True`; with any other the reply is decoded without drafts.
    (`transformers` does not pass `stop_strings` on to custom decoding methods; use its
    `StopStringCriteria` as a stopping criterion instead.)

    Keep the returned object for further calls, as it holds the loaded draft.

    Args:
        draft: A draft's directory, or the network; None for strategies that need none.
        strategy: See `StrategyFactory.make`; None for `cascade` with a draft and `prompt-lookup`
            without one.
        options: The strategy's options, see `StrategyFactory.make`.

    Raises:
        InputError: The strategy is unknown, or doesn't take an option.
    """
    name = strategy or ("prompt-lookup" if draft is None else WITH_DRAFT)
    if name not in STRATEGY_OPTIONS:
        raise InputError(f"The strategies are {', '.join(STRATEGY_OPTIONS)}; got {name!r}.")
    refuse_unknown(options, STRATEGY_OPTIONS[name], f"{name!r} takes")
    return Speculative(draft, name, options)


def output(
    model: PreTrainedModel, input_ids: Tensor, requests: Sequence[Request], config: Any
) -> Tensor | GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput:
    """Return the result of `generate`.

    Args:
        model: The model.
        input_ids: The prompts' tokens, (batch, length).
        requests: The finished requests, one for each row.
        config: The generation settings.

    Returns:
        (batch, length + longest reply) tokens, or with `return_dict_in_generate` an output object
        with them.
    """
    replies = [request.output_token_ids for request in requests]
    longest = max(map(len, replies))
    pad = config._pad_token_tensor
    padding = 0 if pad is None else int(pad)
    ended = [[*reply, *[padding] * (longest - len(reply))] for reply in replies]
    sequences = torch.cat((input_ids, input_ids.new_tensor(ended)), 1)
    if not config.return_dict_in_generate:
        return sequences
    kind: Any = GenerateDecoderOnlyOutput
    if model.config.is_encoder_decoder:
        kind = GenerateEncoderDecoderOutput
    logits = [request.logits for request in requests]
    scores = [
        [
            request.sampler.apply_processors(request.output_token_ids[:place], own)
            for place, own in enumerate(request.logits)
        ]
        for request in requests
    ]
    return kind(
        sequences=sequences,
        scores=stacked(scores, longest) if config.output_scores else None,
        logits=stacked(logits, longest) if config.output_logits else None,
    )


def stacked(rows: Sequence[Sequence[Tensor]], longest: int) -> tuple[Tensor, ...]:
    """Stack tensors of each row by position.

    Args:
        rows: One tensor, (...), for each token of each row.
        longest: Tokens of the longest row.

    Returns:
        One tensor, (batch, ...), for each position; zeros where a row has ended.
    """
    nothing = torch.zeros_like(rows[0][0])
    return tuple(
        torch.stack([row[index] if index < len(row) else nothing for row in rows])
        for index in range(longest)
    )


def for_row(processors: Sequence[LogitsProcessor], row: int) -> list[LogitsProcessor]:
    """Return the logits processors of one row, given those of its batch."""
    found = []
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):
            # The padding before each prompt, which a repetition penalty passes over.
            own: Any = copy.copy(processor)
            own.prompt_ignore_length = ignored[row : row + 1]
            processor = own  # noqa: PLW2901
        found.append(processor)
    return found


def first_unfit(processors: Sequence[LogitsProcessor], rows: int) -> str | None:
    """Return the name of a processor that can't be used with drafts; None if all can.

    Args:
        processors: The processors that `generate` has assembled.
        rows: Batch size; with drafts, rows advance at different times.
    """
    for processor in processors:
        if not is_stateless(processor) or (rows > 1 and isinstance(processor, PER_ROW_PROCESSORS)):
            return getattr(processor, "__name__", type(processor).__name__)
    return None


def check_supported(config: GenerationConfig) -> None:
    """Refuse what speculative decoding can't do exactly.

    Raises:
        InputError: What is not supported, in a sentence.
    """
    asked: Any = config
    if asked.num_beams not in (None, 1):
        raise InputError(
            f"Speculative decoding follows one reply at a time; got num_beams={asked.num_beams}."
        )
    mode = asked.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"The generation settings ask for {mode.value.replace('_', ' ')}, which is a decoding"
            " method of its own; leave it or custom_generate out."
        )
    if asked.return_dict_in_generate and (asked.output_attentions or asked.output_hidden_states):
        raise InputError(
            "A draft is verified in one pass, so attentions and hidden states of single steps are"
            " not there; leave out output_attentions and output_hidden_states."
        )
