"""The parts of a model that a training stage trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language.structure import text_decoder

TRAINABLE_PARTS = ("projector", "decoder", "everything", "lora")
PROJECTOR_NAMES = ("multi_modal_projector", "connector")
"""Names of the projector in the supported families."""


def projector_of(model: PreTrainedModel) -> nn.Module:
    """Return a model's projector, the module between its encoder and its decoder.

    Raises:
        InputError: The model has none.
    """
    for name in PROJECTOR_NAMES:
        found = getattr(model.base_model, name, None)
        if isinstance(found, nn.Module):
            return found
    raise InputError(
        f"{type(model).__name__} has no projector of its own; train everything, or lora."
    )


def has_projector(model: PreTrainedModel) -> bool:
    """Return whether a model has a projector of its own."""
    return any(hasattr(model.base_model, name) for name in PROJECTOR_NAMES)


@contextmanager
def computed_in(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Hold what is frozen of a model's decoder in the precision of a run in this context.

    Mixed precision casts each weight anew in every step; those of matrices that don't change are
    cast once. Afterwards they are as precise as the model again.

    Args:
        model: The model; what learns of it is marked.
        dtype: The precision that a step computes in.
    """
    parts = (text_decoder(model), model.get_output_embeddings())
    found = {p: p.dtype for part in parts for p in part.parameters()}
    held = {p: own for p, own in found.items() if p.dim() > 1 and not p.requires_grad}
    for parameter in held:
        parameter.data = parameter.data.to(dtype)
    yield
    for parameter, own in held.items():
        parameter.data = parameter.data.to(own)


@contextmanager
def learning(model: PreTrainedModel, part: str, rank: int) -> Iterator[None]:
    """Make a part of a model trainable in this context; adapters are merged at its end.

    Args:
        model: The model.
        part: `projector`; `decoder`, the projector and all after it; `everything`; or `lora`, an
            adapter beside each linear layer of the decoder, and the projector where there is one.
        rank: The adapters' rank (alpha = 2 rank).

    Raises:
        InputError: There is no such part, or peft is not installed.
    """
    if part == "lora":
        adapted = with_adapters(model, rank)
        if has_projector(model):
            projector_of(model).requires_grad_(True)
        yield
        adapted.merge_and_unload()
        return
    model.requires_grad_(part == "everything")
    if part in ("projector", "decoder"):
        projector_of(model).requires_grad_(True)
    if part == "decoder":
        text_decoder(model).requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    yield


def with_adapters(model: PreTrainedModel, rank: int) -> Any:
    """Add a LoRA adapter to each linear layer of a model's decoder; all else is frozen.

    Returns:
        peft's wrapper around the model.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("LoRA needs peft: pip install 'fastvlm[lora]'.") from error
    linear = {id(part) for part in text_decoder(model).modules() if isinstance(part, nn.Linear)}
    names = [name for name, part in model.named_modules() if id(part) in linear]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
