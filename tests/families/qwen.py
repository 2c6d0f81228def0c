"""Qwen's models with images: grids of any shape, positions in three axes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tests.families.parts import IMAGE, ROTARY, Family, Inputs, finished, images, lengths, written


def gridded(rows: int) -> Inputs:
    """Return inputs of images in grids of different shapes, in patches of 8 by 8 by 2."""
    grids = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 2, 4], [1, 6, 6]])[:rows]
    asked = written(lengths(rows), (grids.prod(-1) // 4).tolist())
    return {
        **asked,
        "mm_token_type_ids": (asked["input_ids"] == IMAGE).int(),
        "pixel_values": images(int(grids.prod(-1).sum()), 3 * 2 * 8 * 8),
        "image_grid_thw": grids,
    }


GRIDDED: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": 95,
    "vision_start_token_id": 94,
    "vision_end_token_id": 93,
}


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def qwen2_5_vl() -> Family:
    """Qwen2.5-VL: positions in three axes."""
    torch.manual_seed(5)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        text_config={**ROTARY, "rope_parameters": MROPE},
        **GRIDDED,
    )
    return finished(Qwen2_5_VLForConditionalGeneration(config)), gridded


def qwen2_vl() -> Family:
    """Qwen2-VL: positions in three axes."""
    torch.manual_seed(5)
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 8,
        },
        text_config={**ROTARY, "rope_parameters": MROPE},
        **GRIDDED,
    )
    return finished(Qwen2VLForConditionalGeneration(config)), gridded
