"""The text decoder inside a model, and whether it is of the form that can be split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from fastvlm.functional.errors import InputError

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers whose state is keys and values of each position, which can be rolled back."""

NAMES = {
    "embed_tokens": ("embed_tokens", "embed_in", "wte", "word_embeddings"),
    "layers": ("layers", "h", "block", "blocks"),
    "norm": (
        "norm", "final_layernorm", "final_layer_norm", "layer_norm", "ln_f", "norm_f",
    ),
}  # fmt: skip
"""What families call the parts of a decoder."""


def part_name(decoder: Any, part: str) -> str | None:
    """Return what a decoder calls one of its parts; None where it has none of that kind.

    Args:
        decoder: The decoder.
        part: What Llama calls it.
    """
    own = dict(decoder.named_children())
    return next((name for name in NAMES.get(part, (part,)) if name in own), None)


def part_names(decoder: Any) -> dict[str, str]:
    """Return what a decoder calls those of its parts that it has, by what Llama calls them."""
    names = {part: part_name(decoder, part) for part in NAMES}
    return {part: name for part, name in names.items() if name is not None}


def find_part(decoder: Any, part: str) -> Any:
    """Return one of a decoder's parts; None where it has none of that kind. See `part_name`."""
    name = part_name(decoder, part)
    return None if name is None else getattr(decoder, name)


def text_decoder(model: PreTrainedModel) -> Any:
    """Return the decoder inside a causal, an encoder-decoder or a vision-language model.

    It is the module that has the layers: `get_decoder` of some models returns another whole model.
    """
    decoder: Any = model.get_decoder()
    while hasattr(decoder, "get_decoder") and (inner := decoder.get_decoder()) is not decoder:
        decoder = inner
    # Some give their LM head, whose name is a decoder's, and some whole models give themselves.
    if isinstance(decoder, nn.Linear):
        decoder = model.base_model
    if isinstance(decoder, GenerationMixin) and hasattr(decoder, "model"):
        decoder = decoder.model
    return decoder


def attends_causally(decoder: Any) -> bool:
    """Return whether a decoder's layers attend causally where they are given no mask."""
    return all(
        getattr(part, "is_causal", True)
        for name, part in decoder.named_modules()
        if name.endswith("self_attn")
    )


def check_structure(decoder: Any, parts: Sequence[str]) -> None:
    """Refuse a decoder that lacks parts of a form; its weights are not looked at.

    Args:
        decoder: The decoder.
        parts: The names of the modules that it should have.

    Raises:
        InputError: It lacks some, or its layers keep another state than keys and values.
    """
    kind = getattr(getattr(decoder, "config", None), "model_type", type(decoder).__name__)
    others = sorted(
        set(getattr(getattr(decoder, "config", None), "layer_types", None) or ()) - ATTENTION_KINDS
    )
    if others:
        raise InputError(
            f"{kind} has layers of the kind {', '.join(others)}, whose state can't be rolled back"
            " when a draft is rejected; decode it with transformers' own generate."
        )
    if missing := [part for part in parts if part_name(decoder, part) is None]:
        raise InputError(
            f"The decoder of {kind} is a {type(decoder).__name__}, which has no"
            f" {' and no '.join(missing)}, so fastvlm can't split it; decode it with transformers'"
            " own generate, or see 'Adding a family' in fastvlm's documentation."
        )


def device_and_dtype_of(embedding: Any) -> tuple[torch.device, torch.dtype]:
    """Return the device and the precision of hidden states, by the module that embeds tokens.

    They are what comes out of it: its weights may lie elsewhere until they are needed, or be
    quantised.
    """
    weight: Tensor = next(embedding.parameters())
    if type(embedding) is nn.Embedding and not weight.is_meta:
        return weight.device, weight.dtype
    start = torch.device("cpu") if weight.is_meta else weight.device
    found: Tensor = embedding(torch.zeros(1, 1, dtype=torch.long, device=start))
    return found.device, found.dtype
