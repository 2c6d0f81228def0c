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
PIXELS = {"pixel_values", "flattened_patches", "image_pixel_values"}
QUESTIONS = ["What is it?", "Where?", "How many"]


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
    model, inputs = family(name)
    given = inputs(4, images_per_row=images_per_row)
    together = replies(model, given, LIMIT)
    assert_lively(together)
    assert replies(model, inputs(1, images_per_row=images_per_row), LIMIT) == together[:1]
    [pixels] = given.keys() & PIXELS
    others = {**given, pixels: given[pixels].roll(1, dims=0)}
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
    # Kosmos-2.5 can't be asked questions of different lengths together, and sees 4096 patches.
    rows, options = (1, {"max_patches": 20}) if name == "kosmos-2.5" else (3, {})
    images = [sample_image(number) for number in range(rows)]
    found = replies(
        model,
        asked(processor, QUESTIONS[:rows], images, model.dtype, **options),
        LIMIT,
    )
    assert len({tuple(reply) for reply in found}) == rows
    assert max(len(set(reply)) for reply in found) > 1


def loaded(name: str, folder: Path) -> PreTrainedModel:
    """Load a model in the precision of the one that was saved."""
    built, _ = family(name)
    kinds: list[Any] = [AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForCausalLM]
    kind = next(kind for kind in kinds if type(built.config) in kind._model_mapping)
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
