"""Builders of small models with random weights, which several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import FastVlmConfig, FastVlmForConditionalGeneration

from fastvlm.data.questions import Question
from fastvlm.vision import FastViTHD, FastViTHDConfig
from fastvlm.vision.layers import LayerScale
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import SCENE_PROMPT
from fastvlm_example.scenes import describe, sample
from fastvlm_example.tokenizer import IMAGE, learn_tokenizer

IMAGE_SIZE = 128
VISUAL_TOKENS = 4
LIVELY: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large weights, so that random models don't just repeat one token.
    "initializer_range": 0.2,
}


def small_encoder_config(**overrides: Any) -> FastViTHDConfig:
    """Return the configuration of an encoder with all kinds of blocks: 4 tokens at 128 px."""
    shape = {"depths": (2, 1, 1, 2, 1), "widths": (8, 16, 32, 32, 64), "image_size": IMAGE_SIZE}
    return FastViTHDConfig(**{**shape, **overrides})


@torch.no_grad()
def randomise(module: nn.Module, *, shift: float = 0.5) -> None:
    """Give every parameter and statistic a value that shows where it is left out of a sum.

    Kernels are scaled to keep activations near 1, so that no branch vanishes beside another.

    Args:
        module: What to change.
        shift: How far biases and means lie from 0: the less, the more an image counts.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.weight.normal_(std=part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                part.bias.normal_(std=shift)
        elif isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_(std=shift)
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=shift)
                part.running_var.uniform_(0.5, 2.0)
        elif isinstance(part, LayerScale):
            part.gamma.uniform_(0.3, 0.9)


def small_encoder(**overrides: Any) -> FastViTHD:
    """Return an encoder with random weights and statistics, in evaluation mode."""
    torch.manual_seed(3)
    encoder = FastViTHD(small_encoder_config(**overrides)).eval()
    randomise(encoder)
    return encoder


def small_vlm(dtype: torch.dtype = torch.float64, **options: Any) -> VisionLanguageModel:
    """Return a whole model with random weights, for inference, with a tokenizer of scenes."""
    tokenizer = learn_tokenizer([SCENE_PROMPT, *(describe(sample(n)) for n in range(20))], 320)
    torch.manual_seed(11)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = FastVlmConfig(
        vision_config=small_encoder_config().to_dict(),
        text_config={**LIVELY, **special, "vocab_size": len(tokenizer), "bos_token_id": None},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=VISUAL_TOKENS,
    )
    model = FastVlmForConditionalGeneration(config)
    randomise(model.model.vision_tower, shift=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return VisionLanguageModel(model.to(dtype).eval(), tokenizer, **options)


def about_scenes(seeds: Iterable[int]) -> list[Question]:
    """Return the question for an exact description of each scene."""
    return [Question(SCENE_PROMPT, seed) for seed in seeds]
