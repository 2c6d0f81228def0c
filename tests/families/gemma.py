"""Gemma's models with images: Gemma 3, PaliGemma 1 and 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

import fastvlm.vision  # noqa: F401  transformers' FastVLM is then built with our encoder
from tests.families.parts import (
    IMAGE,
    PATCHES,
    ROTARY,
    SIGLIP,
    Inputs,
    NewerFamily,
    lively,
    of_one_size,
)
from tests.families.text_only import GEMMA, SLIDING, in_float32
from tests.models import IMAGE_SIZE, VISUAL_TOKENS, randomise, small_encoder_config

POOLED = 9
"""Tokens of an image: pooled from 36, and more than what a window holds."""
STARTS, ENDS = 94, 93
TURNS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}


def types_of_tokens(made: Inputs) -> dict[str, Tensor]:
    """Return where images are: their tokens see one another, whichever comes first."""
    return {"token_type_ids": (made["input_ids"] == IMAGE).long()}


def gemma3() -> NewerFamily:
    """Gemma 3: SigLIP's patches, pooled; an image's tokens see one another."""
    torch.manual_seed(5)
    config = Gemma3Config(
        vision_config={**SIGLIP, "image_size": 48},
        text_config={
            **ROTARY,
            **GEMMA,
            "model_type": "gemma3_text",
            "layer_types": SLIDING,
            "rope_parameters": TURNS,
        },
        mm_tokens_per_image=POOLED,
        image_token_index=IMAGE,
        boi_token_index=STARTS,
        eoi_token_index=ENDS,
    )
    model = lively(Gemma3ForConditionalGeneration(config))
    block = [STARTS, *[IMAGE] * POOLED, ENDS]
    return model, of_one_size(block, 3, 48, 48, finish=types_of_tokens)


def fast_vlm_gemma3() -> NewerFamily:
    """FastViTHD in front of Gemma 3's decoder of text, to which an image is a row of words."""
    torch.manual_seed(5)
    config = FastVlmConfig(
        vision_config=small_encoder_config().to_dict(),
        text_config={
            **ROTARY,
            **GEMMA,
            "model_type": "gemma3_text",
            "layer_types": SLIDING,
            "rope_parameters": TURNS,
        },
        image_token_id=IMAGE,
        image_seq_length=VISUAL_TOKENS,
    )
    model = FastVlmForConditionalGeneration(config)
    randomise(model.model.vision_tower, shift=0.1)
    return lively(model), of_one_size([IMAGE] * VISUAL_TOKENS, 3, IMAGE_SIZE, IMAGE_SIZE)


def paligemma(model_type: str, **options: Any) -> NewerFamily:
    """PaliGemma: SigLIP's patches; all of a prompt sees all of it."""
    torch.manual_seed(5)
    config = PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config={**ROTARY, **options, "model_type": model_type},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    model = lively(PaliGemmaForConditionalGeneration(config))
    return model, of_one_size(
        [IMAGE] * PATCHES,
        finish=lambda made: {"token_type_ids": torch.zeros_like(made["input_ids"])},
    )


NEWER_GEMMA = {
    "gemma3": gemma3,
    "fast-vlm-gemma3": fast_vlm_gemma3,
    "paligemma": lambda: paligemma("gemma", head_dim=12),
    "paligemma2": lambda: in_float32(paligemma("gemma2", **GEMMA)),
}
