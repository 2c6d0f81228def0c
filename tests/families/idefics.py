"""Idefics3 and SmolVLM: patches shuffled to fewer."""

from __future__ import annotations

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.families.parts import (
    IMAGE,
    PATCHES,
    ROTARY,
    TOWER,
    Family,
    finished,
    images,
    lengths,
    written,
)


def idefics(model: PreTrainedModel) -> Family:
    """Idefics3 and SmolVLM: an image's patches, shuffled to a quarter of them."""
    return finished(model), lambda rows: {
        **written(lengths(rows), [PATCHES // 4] * rows),
        "pixel_values": images(rows, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(rows, 1, 32, 32, dtype=torch.bool),
    }


def idefics3() -> Family:
    """Idefics3: Llama."""
    torch.manual_seed(5)
    config = Idefics3Config(
        vision_config=TOWER,
        text_config={**ROTARY, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return idefics(Idefics3ForConditionalGeneration(config))


def smolvlm() -> Family:
    """SmolVLM: Llama."""
    torch.manual_seed(5)
    config = SmolVLMConfig(
        vision_config=TOWER,
        text_config={**ROTARY, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return idefics(SmolVLMForConditionalGeneration(config))
