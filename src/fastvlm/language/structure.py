"""The text decoder inside a model, and whether it is of the form that can be split."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers whose state is keys and values of each position, which can be rolled back."""


def text_decoder(model: PreTrainedModel) -> Any:
    """Return the decoder inside a causal, an encoder-decoder or a vision-language model.

    It is the module that has the layers: `get_decoder` of some models returns another whole model.
    """
    decoder = model.get_decoder()
    while (inner := decoder.get_decoder()) is not decoder:
        decoder = inner
    return decoder


def check_structure(decoder: Any) -> None:
    """Refuse a decoder that isn't of the usual form; its weights are not looked at.

    Raises:
        InputError: It has no embedding, list of layers or final norm, or its layers keep another
            state than keys and values.
    """
    name, kind = type(decoder).__name__, decoder.config.model_type
    others = sorted(set(getattr(decoder.config, "layer_types", None) or ()) - ATTENTION_KINDS)
    if others:
        raise InputError(
            f"{kind} has layers of the kind {', '.join(others)}, whose state can't be rolled back"
            " when a draft is rejected; decode it with transformers' own generate."
        )
    parts = {"embed_tokens": nn.Module, "layers": nn.ModuleList, "norm": nn.Module}
    missing = [
        part for part, of in parts.items() if not isinstance(getattr(decoder, part, None), of)
    ]
    if missing:
        raise InputError(
            f"The decoder of {kind} is a {name}, which has no {' and no '.join(missing)}, so"
            " fastvlm can't split it; decode it with transformers' own generate, or see 'Adding a"
            " family' in fastvlm's documentation."
        )
