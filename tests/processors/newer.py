"""Processors for the small models of newer families."""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    Gemma3ImageProcessor,
    Gemma3Processor,
    PaliGemmaProcessor,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    SiglipImageProcessor,
)

from tests.families import PATCHES
from tests.families.gemma import POOLED
from tests.processors.parts import SPECIAL, character_tokenizer, still, template


def gemma3() -> ProcessorMixin:
    tokenizer = character_tokenizer(
        "<image_soft_token>",
        special={93: "<end_of_image>", 94: "<start_of_image>"},
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    return Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 48, "width": 48}),
        tokenizer,
        image_seq_length=POOLED,
        chat_template=template("<start_of_image>"),
    )


def paligemma() -> ProcessorMixin:
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = PATCHES
    tokenizer = character_tokenizer(image_token="<image>")
    return PaliGemmaProcessor(images, tokenizer, chat_template=template("<image>"))


def qwen3_vl() -> ProcessorMixin:
    return still(
        Qwen3VLProcessor,
        Qwen2VLImageProcessor(patch_size=8, min_pixels=256, max_pixels=2048),
        character_tokenizer("<|image_pad|>", "<|video_pad|>", special=SPECIAL),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


NEWER_PROCESSORS: dict[str, Callable[[], ProcessorMixin]] = {
    "gemma3": gemma3,
    "paligemma": paligemma,
    "paligemma2": paligemma,
    "qwen3-vl": qwen3_vl,
    "qwen3-vl-moe": qwen3_vl,
}
