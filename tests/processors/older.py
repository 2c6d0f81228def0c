"""Processors for the small models that fastvlm decodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import (
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InstructBlipProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
)

from tests.families import PATCHES, QUERIES
from tests.processors.parts import character_tokenizer, still, template


def llava() -> ProcessorMixin:
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        character_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


PINPOINTS = [[32, 64], [64, 32]]


def llava_next() -> ProcessorMixin:
    return LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=PINPOINTS,
        ),
        character_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


def llava_onevision() -> ProcessorMixin:
    return still(
        LlavaOnevisionProcessor,
        LlavaOnevisionImageProcessor(
            size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        ),
        character_tokenizer(),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )


def qwen(kind: type[ProcessorMixin]) -> ProcessorMixin:
    return still(
        kind,
        Qwen2VLImageProcessor(patch_size=8, min_pixels=256, max_pixels=2048),
        character_tokenizer("<|image_pad|>", "<|video_pad|>"),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


TILED = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def skip_without_torchvision(kind: type) -> None:
    """Skip a test where the release has a class with torchvision only, as 5.17 has these two."""
    if "torchvision" in getattr(kind, "_backends", ()):
        pytest.importorskip("torchvision")


def idefics3() -> ProcessorMixin:
    skip_without_torchvision(Idefics3ImageProcessor)
    return Idefics3Processor(
        Idefics3ImageProcessor(**TILED),
        character_tokenizer(),
        image_seq_len=PATCHES // 4,
        chat_template=template("<image>"),
    )


def smolvlm() -> ProcessorMixin:
    skip_without_torchvision(SmolVLMImageProcessor)
    return still(
        SmolVLMProcessor,
        SmolVLMImageProcessor(**TILED),
        character_tokenizer(),
        image_seq_len=PATCHES // 4,
        chat_template=template("<image>"),
    )


def blip2() -> ProcessorMixin:
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    return Blip2Processor(images, character_tokenizer(), num_query_tokens=QUERIES)


def instructblip() -> ProcessorMixin:
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    reader = character_tokenizer(size=20)
    return InstructBlipProcessor(images, character_tokenizer(), reader, num_query_tokens=QUERIES)


PROCESSORS: dict[str, Callable[[], ProcessorMixin]] = {
    "llava": llava,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "qwen2-vl": lambda: qwen(Qwen2VLProcessor),
    "qwen2.5-vl": lambda: qwen(Qwen2_5_VLProcessor),
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "blip2-opt": blip2,
    "blip2-t5": blip2,
    "instructblip-opt": instructblip,
    "instructblip-t5": instructblip,
    "instructblip-vicuna": instructblip,
}
