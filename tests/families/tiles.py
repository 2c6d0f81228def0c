"""Families that see an image in tiles of one size, and those whose images are of any size."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from tests.families.parts import (
    IMAGE,
    PATCHES,
    ROTARY,
    SIGLIP,
    TOWER,
    WINDOW,
    Inputs,
    NewerFamily,
    images,
    lively,
    of_one_size,
    prompts,
    shared_out,
)
from tests.families.text_only import SLIDING

COHERE2: dict[str, Any] = {
    **ROTARY,
    "model_type": "cohere2",
    "sliding_window": WINDOW,
    "layer_types": SLIDING,
}
SHUFFLED = [IMAGE] * (PATCHES // 4)
STARTS, ENDS, WHOLE, TILE, ROW_ENDS = 94, 93, 92, 91, 90


def aya_vision() -> NewerFamily:
    """Aya Vision: tiles of SigLIP's patches, shuffled to a quarter of them; Cohere 2."""
    torch.manual_seed(5)
    config = AyaVisionConfig(vision_config=SIGLIP, text_config=COHERE2, image_token_index=IMAGE)
    model = lively(AyaVisionForConditionalGeneration(config))
    block = [STARTS, TILE, *SHUFFLED, WHOLE, *SHUFFLED, ENDS]
    return model, of_one_size(block, tiles=2)


def cohere2_vision() -> NewerFamily:
    """Command A Vision: tiles of SigLIP's patches, shuffled to a quarter of them; Cohere 2."""
    torch.manual_seed(5)
    config = Cohere2VisionConfig(
        vision_config=SIGLIP,
        text_config=COHERE2,
        image_token_id=IMAGE,
        alignment_intermediate_size=48,
    )
    model = lively(Cohere2VisionForConditionalGeneration(config))
    block = [STARTS, *[*SHUFFLED, ROW_ENDS] * 2, ENDS]
    return model, of_one_size(block, tiles=2)


def internvl() -> NewerFamily:
    """InternVL 3: tiles of InternViT's patches, shuffled to a quarter of them; Qwen2."""
    torch.manual_seed(5)
    config = InternVLConfig(
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={**ROTARY, "model_type": "qwen2"},
        image_token_id=IMAGE,
        image_seq_length=PATCHES // 4,
    )
    model = lively(InternVLForConditionalGeneration(config))
    return model, of_one_size([STARTS, *SHUFFLED * 2, ENDS], tiles=2)


def of_any_size(rows: int, images_per_row: int = 1) -> Inputs:
    """Return inputs of images of different sizes, each line of which ends with a token."""
    shapes = ([32, 48], [48, 32], [16, 64], [64, 64])
    sizes = [shapes[number % 4] for number in range(rows * images_per_row)]
    blocks = []
    for height, width in sizes:
        lines = [*[IMAGE] * (width // 16), ROW_ENDS] * (height // 16)
        blocks.append([*lines[:-1], ENDS])
    made = prompts(shared_out(blocks, rows))
    if images_per_row:
        made["pixel_values"] = images(len(sizes), 3, 64, 64)
        made["image_sizes"] = torch.tensor(sizes)
    return made


def mistral3() -> NewerFamily:
    """Mistral Small 3.1: Pixtral's patches, merged by four; Mistral."""
    torch.manual_seed(5)
    config = Mistral3Config(
        vision_config={
            **TOWER,
            "model_type": "pixtral",
            "image_size": 64,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4},
        },
        text_config={**ROTARY, "model_type": "mistral", "head_dim": 12, "sliding_window": None},
        image_token_index=IMAGE,
    )
    return lively(Mistral3ForConditionalGeneration(config)), of_any_size


NEWER_TILES = {
    "aya-vision": aya_vision,
    "cohere2-vision": cohere2_vision,
    "internvl": internvl,
    "mistral3": mistral3,
}
