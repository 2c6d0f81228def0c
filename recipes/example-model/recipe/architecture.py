"""The trained model's architecture: a FastViTHD, a projector and a small Qwen2 as decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import (
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from fastvlm.functional.errors import CheckpointError
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm_example.tokenizer import IMAGE

INITIAL = 0.04
"""Standard deviation of the decoder's first weights: near 1 / sqrt(width), so that each layer's
output is felt from the first step."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The decoder's size: a Qwen2 with tied embeddings.

    Heads are many and small: with this shape and these first weights the facts of scenes were
    learnt within 370 steps, where 20 layers of width 192 with three heads over one key/value head
    (and smaller first weights) had learnt colours only after more than a thousand.
    """

    layers: int = 16
    width: int = 256
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 4096
    context: int = 1024


def new_model(
    vision: FastViTHD, tokenizer: PreTrainedTokenizerFast, shape: DecoderShape
) -> FastVlmForConditionalGeneration:
    """Return a model in `transformers`' layout around a trained encoder, its decoder untrained."""
    text: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": True,
        "initializer_range": INITIAL,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = FastVlmConfig(
        vision_config=vision.config.to_dict(),
        text_config=text,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(IMAGE)),
        image_seq_length=(vision.config.image_size // REDUCTION) ** 2,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    use_encoder(model, vision)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Residual branches start small in proportion to their number (as GPT-2's do), so that a deep
    # and narrow decoder learns from the first step.
    for layer in model.model.language_model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data /= math.sqrt(2 * shape.layers)
    # Visual tokens well above the embeddings' size stay legible in the residual stream of every
    # layer, and need not be read in the first ones.
    projector = model.model.multi_modal_projector
    for linear, gain in ((projector.linear_1, 1.0), (projector.linear_2, 2.0)):
        nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    return model


def use_encoder(model: FastVlmForConditionalGeneration, encoder: FastViTHD) -> None:
    """Make `encoder` the model's own: frozen, and folded, which is quicker.

    Raises:
        CheckpointError: Its features are not as wide as the model's projector takes them.
    """
    width = model.model.multi_modal_projector.linear_1.in_features
    if encoder.config.hidden_size != width:
        raise CheckpointError(
            f"The model's projector takes features of width {width}, but the encoder's are"
            f" {encoder.config.hidden_size} wide."
        )
    # Folding makes new weights, so they are frozen after it.
    model.model.vision_tower = encoder.fuse().requires_grad_(False)
    encoder.config.form = "fused"
    # Where it was read from is nobody's business later.
    encoder.config.name_or_path = ""
    model.config.vision_config = encoder.config
