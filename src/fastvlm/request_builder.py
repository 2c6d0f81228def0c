"""Requests from prompts: what can be refused first, then images, several in one pass."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteriaList

from fastvlm.decoding import Request, Sampler, Strategy
from fastvlm.decoding.attempt import attempt
from fastvlm.decoding.generation_config import fit_length, processors_of, settings_of, stopper
from fastvlm.decoding.grammar import GrammarCompiler
from fastvlm.decoding.options import RequestOptions
from fastvlm.decoding.prefix_cache import PrefixCache
from fastvlm.decoding.text import ReplyText
from fastvlm.functional.lru import LruBytes
from fastvlm.functional.messages import Prompt
from fastvlm.language import DecoderInputs
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.generator import end_tokens
from fastvlm.language.weights_state import weights_state
from fastvlm.prompts import ImageFeatureCache, PromptBuilder, messages_of
from fastvlm.vision.loading import ImageInput


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """What a request is made of.

    Args:
        prompt: A question about the image, a dialogue with images, or tokens.
        image: An image, or a list of several; None for none, or a dialogue.
        options: The options.
        strategy: How drafts are made.
        started: When it was asked, in seconds of `time.perf_counter`.
    """

    prompt: Prompt
    image: ImageInput | None
    options: RequestOptions
    strategy: Strategy
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request without its prompt's embeddings.

    Args:
        planned: What it is made of.
        shown: What `PromptBuilder.prepare` made of the prompt.
        ends: The tokens that end the reply.
        constraint: What its tokens must follow; None for nothing.
        settings: The settings of its `transformers` generation.
    """

    planned: PlannedRequest
    shown: Any
    ends: frozenset[int]
    constraint: Any
    settings: Any


class RequestBuilder:
    """Builds requests for a model, in any thread.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        decoder: Its decoder, split.
        prompts: Builds its prompts.
        lru: Where image features and states of earlier prompts are kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoder: SplitDecoder,
        prompts: PromptBuilder,
        lru: LruBytes,
    ) -> None:
        # Which methods and settings a model has is its class's matter.
        self.model: Any = model
        self.tokenizer, self.decoder, self.prompts, self.lru = tokenizer, decoder, prompts, lru
        self.grammars = GrammarCompiler(tokenizer)
        self.prefixes, self.features = PrefixCache(lru), ImageFeatureCache(lru)
        self._weights_state: Any = None

    def all(self, planned: Iterable[PlannedRequest]) -> Iterator[Request]:
        """Yield requests in their order, some of them built ahead: their images go together.

        What is wrong with one is its `error`.
        """
        source = iter(planned)
        while group := list(islice(source, self.prompts.encoded_together)):
            yield from self.build(group)

    def build(self, planned: Sequence[PlannedRequest]) -> list[Request]:
        """Return requests whose images are encoded together; what is wrong with one is its `error`.

        Errors are `InputError`s where an image can't be read, the prompt has a placeholder of its
        own, or an option is out of range.
        """
        prepared = [attempt(partial(self._prepare, one)) for one in planned]
        ready = [one for one in prepared if not isinstance(one, Exception)]
        encoded = (
            inputs
            for keeps, group in groupby(ready, self._keeps)
            for inputs in self._encoded(list(group), keeps=keeps)
        )
        found = []
        for one, first in zip(planned, prepared, strict=True):
            made: Any = first
            if not isinstance(first, Exception):
                made = next(encoded)
                if not isinstance(made, Exception):
                    made = attempt(partial(self._request, first, made))
            found.append(
                Request.failed(made, one.strategy) if isinstance(made, Exception) else made
            )
        return found

    def _prepare(self, planned: PlannedRequest) -> _Prepared:
        """Prepare a prompt, and refuse what can be refused before the long work."""
        params = planned.options.sampling
        messages = messages_of(planned.prompt, planned.image)
        ends: frozenset[int] = frozenset() if params.ignore_eos else end_tokens(self.model)
        constraint = self.grammars.constraint(params.structured, ends)
        settings: Any = settings_of(self.model, params)
        shown = self.prompts.prepare(messages, **planned.options.shown)
        return _Prepared(planned, shown, ends, constraint, settings)

    def _keeps(self, prepared: _Prepared) -> bool:
        """Return whether what was kept is looked up, and this one's states are kept."""
        return prepared.planned.options.scheduling.cache and bool(self.lru.limit)

    def _encoded(
        self, prepared: Sequence[_Prepared], *, keeps: bool
    ) -> list[DecoderInputs | Exception]:
        """Return prompts with their images encoded, or what each failed with."""
        made = attempt(partial(self._encode, prepared, keeps=keeps))
        if not isinstance(made, Exception):
            return [*made]
        if len(prepared) == 1:
            return [made]
        # One of them, or the memory for all, was the matter.
        return [found for one in prepared for found in self._encoded([one], keeps=keeps)]

    def _encode(self, prepared: Sequence[_Prepared], *, keeps: bool) -> list[DecoderInputs]:
        shown = [one.shown for one in prepared]
        if not keeps:
            return self.prompts.encoded(shown)
        state, known = weights_state(self.model), self._weights_state
        if state == known:
            # The same object, or each comparison of two prompts would compare all of the weights.
            state = known
        else:
            # What other weights have computed serves nobody any more.
            self._weights_state = state
            self.lru.clear()
        return [
            inputs
            if inputs.keys is None
            else replace(inputs, keys=[(state, inputs.keys[0]), *inputs.keys[1:]])
            for inputs in self.prompts.encoded(shown, self.features)
        ]

    def _request(self, prepared: _Prepared, inputs: DecoderInputs) -> Request:
        """Return a request of a prompt."""
        planned, settings = prepared.planned, prepared.settings
        params = planned.options.sampling
        stop = params.stop_strings or list(settings.stop_strings or ())
        settings.stop_strings = None
        keeps = self._keeps(prepared) and inputs.keys is not None
        token_ids, device = inputs.token_ids, self.decoder.device
        max_new_tokens = fit_length(settings, len(token_ids))
        processors = processors_of(self.decoder, settings, params, token_ids)
        criteria = self.model._get_stopping_criteria(settings, StoppingCriteriaList())
        return Request(
            inputs,
            planned.strategy,
            max_new_tokens,
            Sampler(
                processors,
                params.drawn_seed,
                token_ids if processors else (),
                prepared.constraint,
            ),
            prepared.ends,
            self.prefixes if keeps else None,
            planned.started,
            stopper(criteria, token_ids, device),
            ReplyText(self.tokenizer, stop, params.min_new_tokens or 0) if stop else None,
            logprobs=params.logprobs,
            priority=planned.options.scheduling.priority,
        )
