"""`model.generate(..., custom_generate=fastvlm.speculative(draft))`: one changed argument."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process as processing
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import (
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)

from fastvlm.decoding import Decoding, Request
from fastvlm.decoding.drafters import Drafters
from fastvlm.decoding.selection import LogitsProcessor, Selection
from fastvlm.drafting import ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.functional.errors import InputError
from fastvlm.language import capture_decoder_inputs, split_decoder

STATEFUL = (
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
"""Processors of `transformers` that remember what they saw, or don't work on text."""
BY_ROW = (
    processing.EncoderNoRepeatNGramLogitsProcessor,
    processing.EncoderRepetitionPenaltyLogitsProcessor,
    processing.PrefixConstrainedLogitsProcessor,
)
"""Processors that treat each row of a batch in its own way."""


class Speculative:
    """A decoding method for `transformers`' `generate`. See `speculative`."""

    def __init__(
        self, draft: str | Path | ImitationNetwork | None, strategy: str | None, options: Any
    ) -> None:
        self.draft, self.strategy, self.options = draft, strategy, options
        self.requests: list[Request] = []
        """The rows of the last call: their drafted and accepted tokens of each cycle."""
        self._known: WeakKeyDictionary[PreTrainedModel, Drafters] = WeakKeyDictionary()

    def drafters(self, model: PreTrainedModel) -> Drafters:
        """Return the ways of drafting for a model, which is split when it is seen first."""
        if model not in self._known:
            network = self.draft
            if isinstance(network, str | Path):
                network = load_draft(network, model)
            self._known[model] = Drafters(split_decoder(model), network)
        return self._known[model]

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

        Raises:
            InputError: It asks for what is not supported: beams, a stateful logits processor,
                attentions, hidden states, a cache that is not empty.
        """
        # transformers hands a decoding method of others all but the streamer, which would wait for
        # tokens for ever.
        streamer = sys._getframe(1).f_locals.get("streamer")
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        check_supported(generation_config, logits_processor, input_ids, vocabulary)
        drafters = self.drafters(model)
        # The stubs take a model's methods for its buffers.
        prepare: Any = model.prepare_inputs_for_generation
        inputs = prepare(input_ids, is_first_iteration=True, **model_kwargs)
        config: Any = generation_config  # whose fields depend on what `generate` was given
        ends = config._eos_token_tensor
        limit = int(config.max_length) - input_ids.shape[1]
        keeps = bool(
            config.return_dict_in_generate and (config.output_scores or config.output_logits)
        )
        self.requests = [
            Request(
                prompt.token_ids,
                prompt.embeddings,
                limit,
                frozenset() if ends is None else frozenset(ends.tolist()),
                positions=prompt.position_ids,
                memory=prompt.encoder_states,
                selection=Selection(for_row(logits_processor, row), config.do_sample, prompt=seen),
                stops=stopper(stopping_criteria, seen, input_ids.device),
                logits=[] if keeps else None,
            )
            for row, (prompt, seen) in enumerate(
                zip(capture_decoder_inputs(model, inputs), input_ids.tolist(), strict=True)
            )
        ]
        decoding = Decoding(
            drafters.decoder, drafters.make(self.strategy, **self.options), self.requests
        )
        for gained in decoding:
            if streamer is not None:
                for token in self.requests[0].reply[-gained[0] :]:
                    streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        replies = [request.reply for request in self.requests]
        longest = max(map(len, replies))
        pad = config._pad_token_tensor
        padding = 0 if pad is None else int(pad)
        ended = [[*reply, *[padding] * (longest - len(reply))] for reply in replies]
        sequences = torch.cat((input_ids, input_ids.new_tensor(ended)), 1)
        if not config.return_dict_in_generate:
            return sequences
        kind: Any = (
            GenerateEncoderDecoderOutput
            if model.config.is_encoder_decoder
            else GenerateDecoderOnlyOutput
        )
        return kind(
            sequences=sequences,
            scores=self.scores(longest) if config.output_scores else None,
            logits=self.logits(longest) if config.output_logits else None,
        )

    def logits(self, longest: int) -> tuple[Tensor, ...]:
        """Return each position's logits, (batch, vocabulary); 0 where a row has ended."""
        return stacked([request.logits or [] for request in self.requests], longest)

    def scores(self, longest: int) -> tuple[Tensor, ...]:
        """Return each position's processed logits, (batch, vocabulary); 0 where a row has ended."""
        return stacked(
            [
                [
                    request.selection.process(request.reply[:index], logits)
                    for index, logits in enumerate(request.logits or [])
                ]
                for request in self.requests
            ],
            longest,
        )


def speculative(
    draft: str | Path | ImitationNetwork | None = None,
    *,
    strategy: str | None = None,
    **options: Any,
) -> Speculative:
    """Return a decoding method for `transformers`' `generate`: the same tokens, sooner.

        model.generate(**inputs, custom_generate=fastvlm.speculative("path/to/draft"))

    What `generate` prepares is honoured: logits processors, stopping criteria, sampling, several
    rows, a streamer, `return_dict_in_generate`. (Of `stop_strings` transformers tells a decoding
    method of others nothing; its `StopStringCriteria` among the stopping criteria does the same.)

    Keep the returned object for further calls: it keeps the draft that it has loaded.

    Args:
        draft: A draft's directory, or the network; None for strategies that need none.
        strategy: See `Drafters.make`; None for `imitation` with a draft and `lookup` without one.
        options: What else `Drafters.make` takes.
    """
    return Speculative(draft, strategy or (None if draft is not None else "lookup"), options)


def stacked(rows: Sequence[Sequence[Tensor]], longest: int) -> tuple[Tensor, ...]:
    """Return tensors by position, (batch, ...), from tensors by row; 0 where a row has ended."""
    nothing = torch.zeros_like(rows[0][0])
    return tuple(
        torch.stack([row[index] if index < len(row) else nothing for row in rows])
        for index in range(longest)
    )


def for_row(processors: Sequence[LogitsProcessor], row: int) -> list[LogitsProcessor]:
    """Return logits processors that were made for a batch as they are for one of its rows."""
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


def stopper(
    criteria: StoppingCriteriaList, prompt: list[int], device: torch.device
) -> Callable[[list[int]], bool] | None:
    """Return what asks stopping criteria of `transformers` after each token of a row.

    The token limit and end tokens are the engine's own matter. None, where there are no others.
    """
    others = StoppingCriteriaList(
        one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)
    )
    if not others:
        return None

    def stops(reply: list[int]) -> bool:
        tokens = torch.tensor([prompt + reply], device=device)
        return bool(others(tokens, None)[0])

    return stops


def check_supported(
    config: GenerationConfig,
    processors: Sequence[LogitsProcessor],
    input_ids: Tensor,
    vocabulary: int,
) -> None:
    """Refuse what speculative decoding can't do exactly.

    Raises:
        InputError: What is not supported, in a sentence.
    """
    asked: Any = config
    if asked.num_beams != 1:
        raise InputError(
            f"Speculative decoding follows one reply at a time; got num_beams={asked.num_beams}."
        )
    if asked.return_dict_in_generate and (asked.output_attentions or asked.output_hidden_states):
        raise InputError(
            "A draft is verified in one pass, so attentions and hidden states of single steps are"
            " not there; leave out output_attentions and output_hidden_states."
        )
    for processor in processors:
        name = type(processor).__name__
        if isinstance(processor, STATEFUL) or remembers(processor, vocabulary, input_ids.device):
            raise InputError(
                f"{name} remembers what it has seen, so it can't judge drafted tokens that may be"
                " rejected; use a stateless logits processor."
            )
        if isinstance(processor, BY_ROW) and len(input_ids) > 1:
            raise InputError(
                f"{name} treats each row of a batch in its own way, and rows of a batch advance at"
                " different times here; decode one row at a time."
            )


def remembers(processor: LogitsProcessor, vocabulary: int, device: torch.device) -> bool:
    """Return whether calling a processor of a user's own changes it. A copy is tried."""
    if type(processor).__module__ == processing.__name__ or not hasattr(processor, "__dict__"):
        return False
    tried = copy.deepcopy(processor)
    before = copy.deepcopy(vars(tried))
    tokens = torch.zeros((1, 1), dtype=torch.long, device=device)
    tried(tokens, torch.zeros((1, vocabulary), device=device))
    after = vars(tried)
    return before.keys() != after.keys() or any(
        not same(value, after[name]) for name, value in before.items()
    )


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; things that don't compare are."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if type(one) in (bool, int, float, str, list, tuple, dict, set):
        return bool(one == other)
    return True
