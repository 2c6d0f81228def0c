"""Processors for the small models of newer families."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AyaVisionProcessor,
    BaseImageProcessor,
    CLIPImageProcessor,
    Florence2Processor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm46VImageProcessor,
    Glm46VProcessor,
    GotOcr2ImageProcessor,
    Granite4VisionProcessor,
    InternVLProcessor,
    Kosmos2_5ImageProcessor,
    Kosmos2_5Processor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MllamaImageProcessor,
    MllamaProcessor,
    PaliGemmaProcessor,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    SiglipImageProcessor,
)

from tests.families import PATCHES
from tests.families.gemma import POOLED
from tests.families.granite import PINPOINTS
from tests.families.kosmos import LATENT
from tests.families.read_first import SEEN
from tests.families.releases import released
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


def glm(kind: type[ProcessorMixin], images: type[BaseImageProcessor]) -> ProcessorMixin:
    return still(
        kind,
        images(patch_size=8, size={"shortest_edge": 512, "longest_edge": 4096}),
        character_tokenizer(
            "<|image|>",
            "<|video|>",
            special={
                91: "<|end_of_video|>",
                92: "<|begin_of_video|>",
                93: "<|end_of_image|>",
                94: "<|begin_of_image|>",
            },
        ),
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"),
    )


def granite_vision(kind: type[ProcessorMixin], **options: str) -> ProcessorMixin:
    return kind(
        LlavaNextImageProcessor(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=PINPOINTS,
        ),
        character_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
        **options,
    )


TILES: dict[str, Any] = {
    "size": {"height": 32, "width": 32},
    "crop_to_patches": True,
    "max_patches": 3,
}


def aya_vision() -> ProcessorMixin:
    special = {
        84: "TILE_3",
        85: "TILE_2",
        86: "TILE_1",
        87: "TILE_GLOBAL",
        88: "<|IMG_LINE_BREAK|>",
        93: "<|END_OF_IMG|>",
        94: "<|START_OF_IMG|>",
        95: "<image>",
    }
    return AyaVisionProcessor(
        GotOcr2ImageProcessor(**TILES),
        character_tokenizer("<|IMG_PATCH|>", special=special),
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        chat_template=template("<image>"),
    )


def granite_docling() -> ProcessorMixin:
    special = {n: f"<row_{n - 81}_col_1>" for n in range(82, 85)}
    special |= {n: f"<row_{n - 84}_col_2>" for n in range(85, 88)}
    special |= {80: "<fake_token_around_image>", 81: "<global-img>"}
    images = transformers.GraniteDoclingImageProcessor(
        size={"height": 32, "width": 32}, max_patches=2
    )
    return transformers.GraniteDoclingProcessor(
        images,
        character_tokenizer(special=special),
        image_seq_len=PATCHES // 4,
        chat_template=template("<image>"),
    )


def internvl() -> ProcessorMixin:
    tokenizer = character_tokenizer(
        "<IMG_CONTEXT>",
        special={93: "</img>", 94: "<img>"},
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return still(
        InternVLProcessor,
        GotOcr2ImageProcessor(**TILES),
        tokenizer,
        image_seq_length=PATCHES // 4,
        chat_template=template("<IMG_CONTEXT>"),
    )


def mllama() -> ProcessorMixin:
    return MllamaProcessor(
        MllamaImageProcessor(size={"height": 16, "width": 16}),
        character_tokenizer("<|image|>", special={80: "<|python_tag|>"}),
        chat_template=template("<|image|>"),
    )


def florence2() -> ProcessorMixin:
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    images.image_seq_length = SEEN
    tokenizer = character_tokenizer(image_token="<image>")
    tokenizer.padding_side = "right"
    return Florence2Processor(images, tokenizer)


def kosmos2_5() -> ProcessorMixin:
    tokenizer = character_tokenizer(
        "<patch>",
        special={93: "</image>", 94: "<image>"},
        image_token="<patch>",
        boi_token="<image>",
        eoi_token="</image>",
    )
    tokenizer.padding_side = "right"
    # The processor writes a prompt's first token itself.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    images = Kosmos2_5ImageProcessor(patch_size={"height": 8, "width": 8}, max_patches=20)
    return Kosmos2_5Processor(images, tokenizer, num_image_tokens=LATENT)


NEWER_PROCESSORS = released(
    {
        "gemma3": gemma3,
        "paligemma": paligemma,
        "paligemma2": paligemma,
        "glm4v": lambda: glm(Glm4vProcessor, Glm4vImageProcessor),
        "glm46v": lambda: glm(Glm46VProcessor, Glm46VImageProcessor),
        "granite-vision": lambda: granite_vision(LlavaNextProcessor),
        "granite4-vision": lambda: granite_vision(Granite4VisionProcessor, downsample_rate="1/2"),
        "granite-docling": granite_docling,
        "kosmos-2.5": kosmos2_5,
        "mllama": mllama,
        "qwen3-vl": qwen3_vl,
        "qwen3-vl-moe": qwen3_vl,
        "florence2": florence2,
        "aya-vision": aya_vision,
        "internvl": internvl,
    }
)
"""Those of Cohere 2 Vision, Llama 4, Mistral 3 and Phi-4 Multimodal need torchvision."""
