"""Qwen's models with images: grids of any shape, positions in three axes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.families.parts import (
    IMAGE,
    ROTARY,
    Family,
    Inputs,
    MakeInputs,
    NewerFamily,
    finished,
    images,
    lengths,
    lively,
    prompts,
    shared_out,
    written,
)


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


QWEN3_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 32,
    "num_position_embeddings": 36,
    # Features of these layers are added to the decoder's first ones.
    "deepstack_visual_indexes": [0, 2],
}
INTERLEAVED = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
SHAPES = [[1, 4, 6], [1, 8, 4], [1, 2, 4], [1, 6, 6]]


def in_grids(starts: int, ends: int, axis: int = 3 * 2 * 8 * 8) -> MakeInputs:
    """Return what makes inputs of images in grids of different shapes, between two tokens.

    Args:
        starts: The token before an image.
        ends: The token after an image.
        axis: How many numbers a patch has.
    """

    def inputs(rows: int, images_per_row: int = 1) -> Inputs:
        count = rows * images_per_row
        grids = torch.tensor(SHAPES * 4)[:count]
        blocks = [[starts, *[IMAGE] * (number // 4), ends] for number in grids.prod(-1).tolist()]
        asked = prompts(shared_out(blocks, rows))
        if not count:
            return asked
        return {
            **asked,
            "mm_token_type_ids": (asked["input_ids"] == IMAGE).int(),
            "pixel_values": images(int(grids.prod(-1).sum()), axis),
            "image_grid_thw": grids,
        }

    return inputs


def qwen3_vl() -> NewerFamily:
    """Qwen3-VL: interleaved axes of positions, features of several layers of its vision tower."""
    torch.manual_seed(5)
    config = Qwen3VLConfig(
        vision_config=QWEN3_VISION,
        text_config={**ROTARY, "head_dim": 8, "rope_parameters": INTERLEAVED},
        **GRIDDED,
    )
    return lively(Qwen3VLForConditionalGeneration(config)), in_grids(94, 93)


def qwen3_vl_moe() -> NewerFamily:
    """Qwen3-VL with a mixture of experts."""
    torch.manual_seed(5)
    config = Qwen3VLMoeConfig(
        vision_config=QWEN3_VISION,
        text_config={
            **ROTARY,
            "head_dim": 8,
            "rope_parameters": INTERLEAVED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        **GRIDDED,
    )
    model = lively(Qwen3VLMoeForConditionalGeneration(config))
    model.set_experts_implementation("eager")
    return model, in_grids(94, 93)


NEWER_QWEN = {"qwen3-vl": qwen3_vl, "qwen3-vl-moe": qwen3_vl_moe}
