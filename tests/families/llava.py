"""LLaVA and those that came of it: patches of images, and of tiles of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

import fastvlm.vision  # noqa: F401  transformers' FastVLM is then built with our encoder
from tests.families.parts import (
    END,
    IMAGE,
    PAD,
    PATCHES,
    ROTARY,
    TOWER,
    Family,
    Inputs,
    finished,
    images,
    lengths,
    written,
)
from tests.models import IMAGE_SIZE, VISUAL_TOKENS, randomise, small_encoder_config


def llava() -> Family:
    """LLaVA-1.5: CLIP's patches, Llama."""
    torch.manual_seed(5)
    config = LlavaConfig(
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        text_config={**ROTARY, "model_type": "llama"},
        image_token_id=IMAGE,
    )
    return finished(LlavaForConditionalGeneration(config)), lambda rows: {
        **written(lengths(rows), [PATCHES] * rows),
        "pixel_values": images(rows, 3, 32, 32),
    }


def tiled(model: PreTrainedModel) -> Callable[[int], Inputs]:
    """Return what makes inputs of images in tiles, of different shapes."""

    def inputs(rows: int) -> Inputs:
        sizes = torch.tensor([[40, 64], [64, 30], [32, 64], [50, 35]])[:rows]
        shown = {"pixel_values": images(rows, 3, 3, 32, 32), "image_sizes": sizes}
        with torch.no_grad():
            features = model.get_image_features(**shown).pooler_output
        return {**written(lengths(rows), list(map(len, features))), **shown}

    return inputs


def llava_next() -> Family:
    """LLaVA-NeXT: tiles of CLIP's patches, packed; Mistral."""
    torch.manual_seed(5)
    config = LlavaNextConfig(
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        text_config={**ROTARY, "model_type": "mistral", "sliding_window": None},
        image_token_id=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    model = finished(LlavaNextForConditionalGeneration(config))
    return model, tiled(model)


def llava_onevision() -> Family:
    """LLaVA-OneVision: tiles of SigLIP's patches, packed; Qwen2."""
    torch.manual_seed(5)
    config = LlavaOnevisionConfig(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**ROTARY, "model_type": "qwen2"},
        image_token_id=IMAGE,
        video_token_id=95,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    model = finished(LlavaOnevisionForConditionalGeneration(config))
    return model, tiled(model)


def fast_vlm() -> Family:
    """FastVLM: FastViTHD, Qwen2."""
    torch.manual_seed(5)
    config = FastVlmConfig(
        vision_config=small_encoder_config().to_dict(),
        text_config={**ROTARY, "model_type": "qwen2"},
        image_token_id=IMAGE,
        image_seq_length=VISUAL_TOKENS,
    )
    model = finished(FastVlmForConditionalGeneration(config))
    randomise(model.model.vision_tower, shift=0.1)
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    return model, lambda rows: {
        **written(lengths(rows), [VISUAL_TOKENS] * rows),
        "pixel_values": images(rows, 3, IMAGE_SIZE, IMAGE_SIZE).sigmoid(),
    }
