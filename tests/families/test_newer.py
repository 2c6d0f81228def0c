"""Newer families: transformers' own generate works on them, and they survive their directories."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from fastvlm.checkpoints.processors import StillImages, load_processor
from tests.families import NEWER, NEWER_WITH_IMAGES, replies
from tests.families.parts import MakeInputs
from tests.processors import NEWER_PROCESSORS, asked, sample_image, saved

LIMIT = 14
ONE_IMAGE: set[str] = set()
"""Families whose prompts have one image."""


@cache
def family(name: str) -> tuple[PreTrainedModel, MakeInputs]:
    return NEWER[name]()


def assert_lively(found: list[list[int]]) -> None:
    assert all(len(set(reply)) > 1 for reply in found)
    assert len({tuple(reply) for reply in found}) == len(found)


@pytest.mark.parametrize("name", NEWER)
def test_replies_to_text_differ_alone_and_in_a_batch(name: str) -> None:
    model, inputs = family(name)
    together = replies(model, inputs(4, images_per_row=0), LIMIT)
    assert_lively(together)
    assert replies(model, inputs(1, images_per_row=0), LIMIT) == together[:1]


@pytest.mark.parametrize("images_per_row", [1, 2])
@pytest.mark.parametrize("name", NEWER_WITH_IMAGES)
def test_replies_to_images_differ_alone_and_in_a_batch(name: str, images_per_row: int) -> None:
    if images_per_row > 1 and name in ONE_IMAGE:
        pytest.skip("A prompt has one image.")
    model, inputs = family(name)
    given = inputs(4, images_per_row=images_per_row)
    together = replies(model, given, LIMIT)
    assert_lively(together)
    assert replies(model, inputs(1, images_per_row=images_per_row), LIMIT) == together[:1]
    others = {**given, "pixel_values": given["pixel_values"].flip(-1)}
    assert replies(model, others, LIMIT) != together


@pytest.mark.parametrize("name", NEWER)
def test_a_model_survives_its_directory(name: str, tmp_path: Path) -> None:
    model, inputs = family(name)
    model.save_pretrained(tmp_path)
    given = inputs(2)
    assert replies(loaded(name, tmp_path), given, LIMIT) == replies(model, given, LIMIT)


@pytest.mark.parametrize("name", NEWER_PROCESSORS)
def test_a_family_answers_about_what_its_processor_shows(name: str, tmp_path: Path) -> None:
    _, made = saved(name, tmp_path)
    model = loaded(name, tmp_path)
    processor = processor_in(tmp_path, model, made)
    images = [sample_image(number) for number in range(3)]
    given = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in asked(processor, ["What is it?", "Where?", "How many"], images).items()
    }
    assert_lively(replies(model, given, LIMIT))


def loaded(name: str, folder: Path) -> PreTrainedModel:
    """Load a model in the precision of the one that was saved."""
    built, _ = family(name)
    kind: Any = AutoModelForCausalLM
    if name in NEWER_WITH_IMAGES:
        kind = AutoModelForImageTextToText
    elif built.config.is_encoder_decoder:
        kind = AutoModelForSeq2SeqLM
    model = kind.from_pretrained(folder, dtype=built.dtype).eval()
    assert type(model) is type(built)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model


def processor_in(folder: Path, model: PreTrainedModel, made: ProcessorMixin) -> ProcessorMixin:
    """Load a processor as anyone would, unless it has a part that needs torchvision."""
    if isinstance(made, StillImages):
        return load_processor(folder, model.config)
    return AutoProcessor.from_pretrained(folder)
