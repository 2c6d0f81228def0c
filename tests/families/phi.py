"""Phi-4 Multimodal: tiles of any shape, and a decoder that is Phi-3's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from tests.families.parts import (
    END,
    IMAGE,
    ROTARY,
    TOWER,
    Inputs,
    NewerFamily,
    images,
    lively,
    prompts,
    shared_out,
)

SHAPES = [[1, 2], [2, 1], [1, 1], [1, 2]]
"""Tiles of images, in height and width."""
TILES = 3
"""How many tiles there is room for, beside the one of all of an image.

It is more than any image has: without padding transformers' attention in this tower is causal.
"""
SIDE = 2
"""Tokens on each side of a tile."""
CROP = 32
HEARD = 95


def phi4_multimodal(**options: Any) -> NewerFamily:
    """Phi-4 Multimodal, which could hear too.

    Args:
        options: Fields of its configuration.
    """
    torch.manual_seed(5)
    config = Phi4MultimodalConfig(
        **{**ROTARY, "eos_token_id": [END], **options},
        vision_config={**TOWER, "crop_size": CROP, "image_token_id": IMAGE},
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "input_size": 8,
            "audio_token_id": HEARD,
        },
    )
    model = lively(Phi4MultimodalForCausalLM(config))
    with torch.no_grad():
        # Where a reply had one of these, transformers would look for what to put there.
        model.lm_head.weight[[HEARD, IMAGE]] = 0.0
    return model, in_lines


def in_lines(rows: int, images_per_row: int = 1) -> Inputs:
    """Return inputs of images whose lines of tokens have an end each."""
    shapes = [SHAPES[number % 4] for number in range(rows * images_per_row)]
    blocks = [
        [IMAGE] * (height * SIDE * (width * SIDE + 1) + 1 + SIDE * (SIDE + 1))
        for height, width in shapes
    ]
    made = prompts(shared_out(blocks, rows))
    if not images_per_row:
        return made
    sizes = torch.tensor(shapes)
    there = torch.arange(1 + TILES) <= sizes.prod(dim=1, keepdim=True)
    patches = CROP // TOWER["patch_size"]
    return {
        **made,
        "image_pixel_values": images(len(shapes), 1 + TILES, 3, CROP, CROP),
        "image_sizes": sizes * CROP,
        "image_attention_mask": there[..., None, None].expand(-1, -1, patches, patches).clone(),
    }


NEWER_PHI = {"phi4-multimodal": phi4_multimodal}
