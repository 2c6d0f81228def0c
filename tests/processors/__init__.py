"""Processors for the small models of `tests.families`, of the classes that the families have."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from tests.families import END, FAMILIES, NEWER, PAD
from tests.processors.newer import NEWER_PROCESSORS
from tests.processors.older import PROCESSORS
from tests.processors.parts import (
    TEMPLATE,
    TEXT_TEMPLATE,
    asked,
    character_tokenizer,
    sample_image,
    template,
)

__all__ = [
    "NEWER_PROCESSORS",
    "PROCESSORS",
    "TEMPLATE",
    "TEXT_TEMPLATE",
    "asked",
    "character_tokenizer",
    "sample_image",
    "saved",
    "template",
]


def saved(family: str, folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Save a family's small model and its processor; return both."""
    model, _ = {**FAMILIES, **NEWER}[family]()
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    processor = {**PROCESSORS, **NEWER_PROCESSORS}[family]()
    if family == "qwen3-vl-moe":
        # Experts are loaded in an implementation that doesn't compute in float64.
        model.float()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
