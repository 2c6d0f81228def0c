"""A target's fingerprint: which weights a draft was made for, or replies came from."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.language.structure import text_decoder
from fastvlm.language.weights_state import adapter_flags, plain_parts

DECODER_VALUES = 128
LM_HEAD_VALUES = 32
"""The number of values of a decoder and of an LM head in a fingerprint."""
SAMPLED_RANGE_VALUES = 2**18
"""Samples are taken from this many values at a weight's beginning, as a vocabulary may grow."""
SAMPLE_STRIDE_VALUES = 100_003
"""The distance between successive samples, a prime number."""
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 2**-7, 1e-6
"""Tolerances of equal values: twice the error of rounding to bfloat16 and then to float16."""
UNREADABLE_REASON = "as they are quantised or offloaded"
HASHED_VALUES = 64
"""The number of values at the beginning of each parameter that are hashed."""
HASH_DIGITS = 16


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """Return a fingerprint of a target's decoder and LM head, which its drafts record.

    It is a hash of the parameters' names, and some of their values in bfloat16, in base64. Values
    rather than a hash of them, so that the same checkpoint is recognised in another precision, see
    `difference`. Adapters are left out, and values that can't be read are NaN.
    """
    decoder, head = sorted(base_parameters(text_decoder(model))), _head(model)
    values = *_sampled(decoder, DECODER_VALUES), *_sampled(head, LM_HEAD_VALUES)
    rounded = torch.tensor(values).to(torch.bfloat16).view(torch.int16).tolist()
    stored = base64.b64encode(struct.pack(f"<{len(rounded)}h", *rounded)).decode()
    return f"{_names(decoder)}:{stored}"


def difference(recorded: str | None, model: Any) -> str | None:
    """Return why a draft may have been made for other weights than a model's; None if it fits.

    Weights that differ by no more than a change of precision are taken as the same. A decoder that
    was quantised, or has an adapter, is compared by its weights in floating point, without the
    adapter.

    Args:
        recorded: The fingerprint that the draft recorded; or the 16 digits of earlier drafts, which
            cover the decoder alone, in float32 and bfloat16.
        model: The model.

    Returns:
        The reason, as the end of a sentence.
    """
    if recorded is None:
        return "it doesn't record for which"
    if ":" not in recorded:
        return _difference_of_digits(recorded, model)
    (names, before), (names_now, now) = _parsed(recorded), _parsed(fingerprint(model))
    if names != names_now or len(before) != len(now):
        return "the parameters of this model's decoder have other names"
    pairs = list(zip(before, now, strict=True))
    compared = [(old, new) for old, new in pairs if math.isfinite(old) and math.isfinite(new)]
    other = sum(not _is_close(old, new) for old, new in compared)
    unread = sum(math.isfinite(old) and math.isnan(new) for old, new in pairs)
    if other:
        return f"{other} of {len(compared)} compared values differ"
    if unread:
        return f"{unread} of {len(pairs)} values of this model can't be read, {UNREADABLE_REASON}"
    return None if compared else f"its target's values could not be read, {UNREADABLE_REASON}"


def _difference_of_digits(recorded: str, model: Any) -> str | None:
    if not all(_is_readable(one) for _, one in base_parameters(text_decoder(model))):
        return f"some of this model's values can't be read, {UNREADABLE_REASON}"
    digits = decoder_hash(model)
    return None if recorded == digits else f"its fingerprint is {recorded}, this model's {digits}"


@torch.no_grad()
def weights_hash(model: Any) -> str:
    """Return 16 hexadecimal digits that identify all weights that a model's tokens depend on.

    It covers the decoder and the LM head with their adapters and which of these are active, by the
    first values of each parameter, rounded to bfloat16. Quantised weights are covered by their
    stored parts, offloaded ones by the model's name.
    """
    digest = hashlib.sha256()
    for root in (text_decoder(model), model.get_output_embeddings()):
        if root is None:
            continue
        for module in root.modules():
            if hasattr(type(module), "merged_adapters"):
                digest.update(repr(adapter_flags(module)).encode())
        for name, parameter in sorted(root.named_parameters()):
            for part in plain_parts(parameter):
                _add(digest, name, part, str(model.name_or_path))
    return digest.hexdigest()[:HASH_DIGITS]


@torch.no_grad()
def decoder_hash(model: Any) -> str:
    """Return the 16 hexadecimal digits that earlier drafts recorded of their target's decoder."""
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(text_decoder(model))):
        _add(digest, name, parameter)
    return digest.hexdigest()[:HASH_DIGITS]


def base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's parameters without PEFT's adapters, under their names without them."""
    if hasattr(type(module), "merged_adapters"):
        parts = module._modules
        if inner := parts.get("base_layer") or parts.get("original_module"):
            yield from base_parameters(inner, prefix)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module.named_children():
        yield from base_parameters(child, f"{prefix}{name}.")


def _head(model: Any) -> list[tuple[str, nn.Parameter]]:
    head = model.get_output_embeddings()
    return [] if head is None else sorted(base_parameters(head))


def _names(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    return hashlib.sha256(" ".join(name for name, _ in parameters).encode()).hexdigest()[:8]


def _sampled(parameters: list[tuple[str, nn.Parameter]], number: int) -> list[float]:
    """Return values of parameters in turns, as evenly as they go; without any, no numbers."""
    if not parameters:
        return [math.nan] * number
    chosen = (parameters[place * len(parameters) // number][1] for place in range(number))
    return [_value(one, (place + 1) * SAMPLE_STRIDE_VALUES) for place, one in enumerate(chosen)]


def _value(parameter: Tensor, place: int) -> float:
    """Return a value of a parameter; no number where it can't be read."""
    if not _is_readable(parameter):
        return math.nan
    place %= min(parameter.numel(), SAMPLED_RANGE_VALUES)
    where = []
    for size in reversed(parameter.shape):
        place, index = divmod(place, size)
        where.append(index)
    return float(parameter[tuple(reversed(where))])


def _is_readable(parameter: Tensor) -> bool:
    """Return whether a parameter's values are numbers that lie somewhere."""
    plain = type(parameter) in {nn.Parameter, Tensor} and not parameter.is_meta
    return plain and parameter.is_floating_point() and parameter.numel() > 0


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


def _parsed(recorded: str) -> tuple[str, list[float]]:
    """Return the names' hash and the values of a fingerprint; no values of one that is broken."""
    names, _, stored = recorded.partition(":")
    try:
        data = base64.b64decode(stored, validate=True)
        rounded = struct.unpack(f"<{len(data) // 2}h", data)
    except (binascii.Error, struct.error):
        return names, []
    return names, torch.tensor(rounded, dtype=torch.int16).view(torch.bfloat16).tolist()


def _add(digest: Any, name: str, parameter: Tensor, otherwise: str = "") -> None:
    """Add a parameter's name, its shape and its first values, or what stands for them."""
    digest.update(f"{name}{tuple(parameter.shape)}".encode())
    if parameter.is_meta:
        digest.update(otherwise.encode())
        return
    values = parameter.detach().flatten()[:HASHED_VALUES].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    digest.update(bytes(values.view(torch.uint8).tolist()))
