"""Hold a split decoder against the model that it is part of, before it decodes anything."""

from __future__ import annotations

import inspect
import json
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.functional.digests import digest
from fastvlm.functional.errors import FastVlmError, InputError, first_line
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.decoder_inputs import DecoderInputs
from fastvlm.language.generator import generator_of

PROMPTS = (9, 5)
"""Positions of the prompts of the check, the longer one first."""
REPLY = 4
"""Positions that follow each in one pass."""
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
"""The greatest error of logits, as a share of their spread."""
COARSE_TOLERANCE = 0.1
"""The same in 16 bits, of the median position: rounding may send single tokens elsewhere."""

_verified: set[str] = set()
_turn = Lock()


def verify_split(split: SplitDecoder) -> None:
    """Refuse a split decoder whose logits are not the model's own.

    Two prompts of different lengths, and a pass of several tokens after both, are compared with the
    model's own `forward` on the padded batch: all logits, not only the best tokens. It is done once
    for a class of model and a configuration.

    Raises:
        InputError: They differ, or the model's own `forward` fails on text.
    """
    model = split.model
    settings = json.dumps(model.config.to_dict(), sort_keys=True, default=repr)
    key = digest([type(model).__qualname__, type(split.decoder).__qualname__, settings])
    with _turn:
        if key in _verified:
            return
    name = type(model).__name__
    try:
        error = _worst_error(split, generator_of(model))
    except FastVlmError:
        raise
    except Exception as caught:  # whatever a family's own code stumbles over
        raise InputError(
            f"fastvlm can't split {name}: {first_line(caught)}. Decode it with transformers' own"
            " generate."
        ) from caught
    if not error <= TOLERANCES.get(split.dtype, COARSE_TOLERANCE):
        raise InputError(
            f"fastvlm can't split {name}: its layers, called one by one, give other logits than the"
            f" model itself (by {error:.1%} of their spread). Decode it with transformers' own"
            " generate."
        )
    with _turn:
        _verified.add(key)


@torch.no_grad()
def _worst_error(split: SplitDecoder, model: PreTrainedModel) -> float:
    """Return the error of the split decoder's logits, as a share of the model's own spread."""
    longest = PROMPTS[0] + REPLY
    tokens = _ordinary_tokens(model, len(PROMPTS) * longest).view(len(PROMPTS), longest)
    tokens = tokens.to(split.device)
    rows = [row[: length + REPLY] for row, length in zip(tokens, PROMPTS, strict=True)]
    wanted = _own_logits(model, rows)
    found = _split_logits(split, rows)
    errors = torch.cat(
        [
            (one - other).abs().amax(-1) / other.std(-1).clamp(min=1e-30)
            for one, other in zip(found, wanted, strict=True)
        ]
    )
    return float(errors.max() if split.dtype in TOLERANCES else errors.median())


def _ordinary_tokens(model: PreTrainedModel, number: int) -> Tensor:
    """Return so many tokens that a configuration has no name for."""
    special = set(_named_tokens(model.config.to_dict()))
    size: Any = model.config.get_text_config(decoder=True).vocab_size
    known = [token for token in range(min(size, 4096)) if token not in special]
    if not known:
        raise InputError("The model's vocabulary has no ordinary token.")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    chosen = order.repeat(-(-number // len(known)))[:number]
    return torch.tensor(known)[chosen]


def _named_tokens(settings: Any) -> list[int]:
    if isinstance(settings, dict):
        found = []
        for name, value in settings.items():
            if "token" in str(name) and isinstance(value, int):
                found.append(value)
            elif "token" in str(name) and isinstance(value, list):
                found += [one for one in value if isinstance(one, int)]
            else:
                found += _named_tokens(value)
        return found
    return []


def _own_logits(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """Return the logits of rows by the model's own forward, padded on the left in one batch."""
    longest = max(map(len, rows))
    tokens = torch.stack([torch.cat((row[:1].expand(longest - len(row)), row)) for row in rows])
    mask = torch.stack(
        [(torch.arange(longest, device=row.device) >= longest - len(row)).long() for row in rows]
    )
    given = cast(Any, model).prepare_inputs_for_generation(
        tokens, attention_mask=mask, is_first_iteration=True, use_cache=False
    )
    given = {name: value for name, value in given.items() if value is not None}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        given.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
    training = model.training
    model.eval()
    try:
        logits: Tensor = model(**{**given, "use_cache": False, "return_dict": True}).logits
    finally:
        model.train(training)
    return [logits[index, longest - len(row) :] for index, row in enumerate(rows)]


def _split_logits(split: SplitDecoder, rows: list[Tensor]) -> list[Tensor]:
    """Return the logits of rows by the split decoder: each prompt, then a pass of both replies."""
    cache = split.cache(len(rows), max(map(len, rows)))
    firsts = []
    for slot, row in enumerate(rows):
        prompt = row[: len(row) - REPLY]
        x = split.embed(prompt[None])
        cache.assign(slot, DecoderInputs(prompt.tolist(), x[0]))
        positions = cache.positions([0], len(prompt), [slot])
        firsts.append(split.head(split.forward_layers(x, positions, cache, range(split.depth)))[0])
    x = split.embed(torch.stack([row[-REPLY:] for row in rows]))
    positions = cache.positions([len(row) - REPLY for row in rows], REPLY)
    half = split.depth // 2
    x = split.forward_layers(x, positions, cache, range(half))
    x = split.forward_layers(x, positions, cache, range(half, split.depth))
    rest = split.head(x)
    return [torch.cat(pair) for pair in zip(firsts, rest, strict=True)]
