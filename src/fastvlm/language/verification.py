"""Hold a split decoder against the model that it is part of, before it decodes anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.functional.digests import digest
from fastvlm.functional.errors import FastVlmError, InputError, first_line
from fastvlm.functional.overrides import override_method
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.decoder_inputs import DecoderInputs
from fastvlm.language.example_source import example_source
from fastvlm.language.generator import generator_of
from fastvlm.language.quantised import Int4Linear, Int8Linear

PROMPTS = (9, 5)
"""Positions of the prompts of the check, the longer one first."""
REPLY = 4
"""Positions that follow each in one pass."""
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
"""The greatest error, as a share of the spread of what is compared. Parts of a model may compute in
float32 whatever its precision."""
COARSE_TOLERANCE = 0.05
"""The same in 16 bits or with quantised weights, of the root mean square at the median position:
rounding may send single tokens to other experts, and falls on the few large states that some
families have (Gemma's: 0.02 with weights in 4 bits)."""


class LogitRule(NamedTuple):
    """What a model makes of its LM head's outputs.

    Args:
        factor: They are multiplied by it.
        divisor: They are divided by it.
        cap: They are soft-capped at it: cap * tanh(x / cap).
    """

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits, in the shape of `x`."""
        if self.factor is not None:
            x = x * self.factor
        if self.divisor is not None:
            x = x / self.divisor
        return x if self.cap is None else torch.tanh(x / self.cap) * self.cap


_verified: dict[str, LogitRule] = {}
_turn = Lock()


def verified_rule(split: SplitDecoder) -> LogitRule:
    """Refuse a split decoder that isn't the model's own decoder; return its rule for logits.

    Two prompts of different lengths, and a pass of several tokens after both together, are compared
    with the decoder's own `forward`: all of the hidden states that the LM head is given. What the
    model makes of the LM head's outputs is compared with the rules of `LogitRule`. It is done once
    for a class of model and a configuration.

    Raises:
        InputError: They differ, or the model's own `forward` fails on text.
    """
    model = split.model
    settings = json.dumps(model.config.to_dict(), sort_keys=True, default=repr)
    key = digest([type(model).__qualname__, type(split.decoder).__qualname__, settings])
    with _turn:
        if key in _verified:
            return _verified[key]
    name = type(model).__name__
    try:
        with torch.no_grad():
            error, rule = _compare(split, generator_of(model))
    except FastVlmError:
        raise
    except Exception as caught:  # whatever a family's own code stumbles over
        raise InputError(
            f"fastvlm can't split {name}: {first_line(caught)}. Decode it with transformers' own"
            " generate."
        ) from caught
    if not error <= (COARSE_TOLERANCE if _is_coarse(split) else TOLERANCES[split.dtype]):
        raise InputError(
            f"fastvlm can't split {name}: its layers, called one by one, give other states than its"
            f" decoder (by {error:.1%} of their spread). Decode it with transformers' own generate."
        )
    with _turn:
        _verified[key] = rule
    return rule


def _compare(split: SplitDecoder, model: PreTrainedModel) -> tuple[float, LogitRule]:
    """Return the error of the split decoder's states, and the model's rule for logits."""
    longest = PROMPTS[0] + REPLY
    tokens = ordinary_tokens(model, len(PROMPTS) * longest).view(len(PROMPTS), longest)
    tokens = tokens.to(split.device)
    source = example_source(split.decoder, split.embed(tokens))
    training = model.training
    model.eval()
    try:
        states, logits = _own_outputs(split, model, tokens, source)
        rule = _logit_rule(split, states, logits)
        found = _split_states(split, tokens, source)
    finally:
        model.train(training)
    wanted = [row[: len(own)] for row, own in zip(states, found, strict=True)]
    return _error(split, torch.cat(found), torch.cat(wanted)), rule


def _error(split: SplitDecoder, found: Tensor, wanted: Tensor) -> float:
    """Return how far rows of numbers lie from others, as a share of the others' spread."""
    errors, spread = (found - wanted).abs(), wanted.std(-1).clamp(min=1e-30)
    if _is_coarse(split):
        return float((errors.square().mean(-1).sqrt() / spread).median())
    return float((errors.amax(-1) / spread).max())


def _is_coarse(split: SplitDecoder) -> bool:
    """Return whether a model computes in 16 bits or less, or with quantised weights."""
    quantised = bool(getattr(split.model, "is_quantized", False))
    ours = any(isinstance(part, Int8Linear | Int4Linear) for part in split.decoder.modules())
    return split.dtype not in TOLERANCES or quantised or ours


def ordinary_tokens(model: PreTrainedModel, number: int) -> Tensor:
    """Return so many tokens that a configuration has no name for."""
    special = set(_named_tokens(model.config.to_dict()))
    size: Any = model.config.get_text_config(decoder=True).vocab_size
    known = [token for token in range(min(size, 4096)) if token not in special]
    if not known:
        raise InputError("The model's vocabulary has no ordinary token.")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    chosen = order.repeat(-(-number // len(known)))[:number]
    return torch.as_tensor(known)[chosen]


def _named_tokens(settings: dict[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _named_tokens(value)
        elif "token" in str(name):
            yield from (one for one in (value if isinstance(value, list) else [value]) if one)


def _own_outputs(
    split: SplitDecoder, model: PreTrainedModel, tokens: Tensor, source: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the normed states that the decoder itself makes of a text, and the model's logits."""
    seen: list[Tensor] = []

    def causal(original: Callable[..., Any], *_: Any, **__: Any) -> Any:
        # A model may let its decoder's positions see one another; text alone is causal here.
        found = _own_pass(split, original, tokens, source)
        seen.append(found[0])
        return found

    both = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with override_method(split.decoder, "forward", causal):
        logits: Tensor = model(input_ids=tokens, use_cache=False, return_dict=True, **both).logits
    return seen[-1], logits


def _own_pass(
    split: SplitDecoder, forward: Callable[..., Any], tokens: Tensor, source: dict[str, Tensor]
) -> Any:
    """Return what a decoder's own forward makes of a text."""
    # Attention that isn't causal by itself is so where there is a mask, as padding makes one.
    padding = 0 if split.is_causal else 1
    padded = torch.cat((tokens[:, :padding], tokens), 1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    given: dict[str, Any] = dict(source)
    if padding:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    found = forward(
        inputs_embeds=split.embed(padded), attention_mask=mask, use_cache=False, **given
    )
    found.last_hidden_state = found.last_hidden_state[:, padding:]
    return found


def _logit_rule(split: SplitDecoder, states: Tensor, logits: Tensor) -> LogitRule:
    """Return what a model makes of its LM head's outputs, by its logits of some states.

    Raises:
        InputError: It is none of what a `LogitRule` does.
    """
    raw = split.raw_logits(states)
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    given = [{None, getattr(split.decoder.config, name, None)} for name in names]
    for rule in map(LogitRule._make, product(*given)):
        found = rule(raw)
        if found.shape == logits.shape and _error(split, found, logits) <= 1e-6:  # noqa: PLR2004
            return rule
    raise InputError(
        f"{type(split.model).__name__} changes its LM head's outputs in a way that fastvlm doesn't"
        " know; decode it with transformers' own generate."
    )


def _split_states(split: SplitDecoder, tokens: Tensor, source: dict[str, Tensor]) -> list[Tensor]:
    """Return the same by the split decoder: each prompt, then a pass of both replies together."""
    cache = split.cache(len(PROMPTS), PROMPTS[0] + REPLY)
    firsts = []
    for slot, length in enumerate(PROMPTS):
        prompt = tokens[slot, :length]
        x = split.embed(prompt[None])
        states = next((given[slot] for given in source.values()), None)
        # All is a prompt, of which even a cache with a window of its own keeps everything.
        whole = tokens[slot].tolist()
        cache.assign(slot, DecoderInputs(whole, x[0], encoder_states=states))
        positions = cache.positions([0], length, [slot])
        firsts.append(split.norm(split.forward_layers(x, positions, cache, range(split.depth)))[0])
    replies = [row[length : length + REPLY] for row, length in zip(tokens, PROMPTS, strict=True)]
    x = split.embed(torch.stack(replies))
    positions = cache.positions(PROMPTS, REPLY)
    half = split.depth // 2
    x = split.forward_layers(x, positions, cache, range(half))
    x = split.forward_layers(x, positions, cache, range(half, split.depth))
    return [torch.cat(pair) for pair in zip(firsts, split.norm(x), strict=True)]
