"""GLM's models with images: positions in three axes, of which a part is rotated."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
)

from tests.families.parts import IMAGE, ROTARY, NewerFamily, lively
from tests.families.qwen import in_grids

STARTS, ENDS = 94, 93
SHAPE: dict[str, Any] = {
    "vision_config": {
        "model_type": "glm4v_vision",
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "out_hidden_size": 32,
    },
    "text_config": {
        **ROTARY,
        "model_type": "glm4v_text",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "image_token_id": IMAGE,
    "video_token_id": 95,
    "image_start_token_id": STARTS,
    "image_end_token_id": ENDS,
    "video_start_token_id": 92,
    "video_end_token_id": 91,
}


def glm4v() -> NewerFamily:
    """GLM-4.1V: norms on both sides of each part of a layer."""
    torch.manual_seed(5)
    model = lively(Glm4vForConditionalGeneration(Glm4vConfig(**SHAPE)))
    return model, in_grids(STARTS, ENDS)


def glm46v() -> NewerFamily:
    """GLM-4.6V: a shell of its own around the parts of GLM-4.1V."""
    torch.manual_seed(5)
    model = lively(Glm46VForConditionalGeneration(Glm46VConfig(**SHAPE)))
    return model, in_grids(STARTS, ENDS)


NEWER_GLM = {"glm4v": glm4v, "glm46v": glm46v}
