"""Models of text alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families.parts import (
    DEPTH,
    OPT,
    ROTARY,
    WINDOW,
    Family,
    Inputs,
    NewerFamily,
    finished,
    lengths,
    lively,
    prompts,
    written,
)

SLIDING = ["sliding_attention", "full_attention"] * (DEPTH // 2)
"""Every other layer, as Gemma and Cohere have it."""
GEMMA: dict[str, Any] = {
    "head_dim": 12,
    "query_pre_attn_scalar": 10,
    "sliding_window": WINDOW,
}
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 6.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "tie_word_embeddings": True,
}
LLAMA4: dict[str, Any] = {
    "head_dim": 8,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0, 1, 0],
    "attention_chunk_size": WINDOW,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": ROTARY["max_position_embeddings"] // 32,
}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}


def text(model_type: str, gain: float = 3.0, **options: Any) -> Family:
    """Return a model of text alone."""
    torch.manual_seed(5)
    shape = OPT if model_type == "opt" else {**ROTARY, "model_type": model_type}
    config = AutoConfig.for_model(**{**shape, **options})
    return finished(AutoModelForCausalLM.from_config(config), gain), lambda rows: written(
        lengths(rows), [0] * rows
    )


def words(rows: int, images_per_row: int = 0) -> Inputs:  # noqa: ARG001  nothing is shown
    """Return prompts of text."""
    return prompts([[]] * rows)


def newer_text(model_type: str, seed: int = 5, **options: Any) -> NewerFamily:
    """Return a model of text alone, in which norms and biases count too."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**ROTARY, "model_type": model_type, **options})
    return lively(AutoModelForCausalLM.from_config(config)), words


def bloom() -> NewerFamily:
    """BLOOM, whose generate has other tokens in a padded batch: all prompts are of one length."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(**{**ROTARY, "model_type": "bloom"})
    model = lively(AutoModelForCausalLM.from_config(config), shift=0.1)
    return model, lambda rows, images_per_row=0: prompts([[]] * rows, even=True)  # noqa: ARG005


def experts(model_type: str, **options: Any) -> NewerFamily:
    """Return a model with a mixture of experts."""
    model, inputs = newer_text(model_type, num_experts_per_tok=2, **options)
    model.set_experts_implementation("eager")  # the only one that computes in float64
    return model, inputs


def in_float32(family: NewerFamily) -> NewerFamily:
    """Return a family whose attention is eager: in float64 padded rows would get NaN from it."""
    model, inputs = family
    return model.float(), inputs


NEWER_TEXT: dict[str, Callable[[], NewerFamily]] = {
    "gemma2": lambda: in_float32(newer_text("gemma2", **GEMMA)),
    "gemma3-text": lambda: newer_text("gemma3_text", layer_types=SLIDING, **GEMMA),
    "cohere": lambda: newer_text("cohere", logit_scale=0.25, use_qk_norm=True),
    "cohere2": lambda: newer_text("cohere2", sliding_window=WINDOW, layer_types=SLIDING),
    "granite": lambda: newer_text("granite", **GRANITE),
    "glm": lambda: newer_text("glm", seed=7, head_dim=16),
    "glm4": lambda: newer_text("glm4", head_dim=16),
    "mixtral": lambda: experts("mixtral", num_local_experts=4),
    "qwen3-moe": lambda: experts(
        "qwen3_moe",
        num_experts=4,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "gpt-oss": lambda: in_float32(
        experts(
            "gpt_oss",
            head_dim=8,
            num_local_experts=4,
            sliding_window=WINDOW,
            layer_types=SLIDING,
            rope_parameters=YARN,
        )
    ),
    "phi3": lambda: newer_text("phi3", sliding_window=WINDOW),
    "phi3-long": lambda: newer_text(
        "phi3", rope_parameters=LONG, original_max_position_embeddings=64
    ),
    "phimoe": lambda: experts("phimoe", num_local_experts=4),
    "olmo2": lambda: newer_text("olmo2"),
    "smollm3": lambda: newer_text("smollm3", no_rope_layers=[1, 0, 1, 1]),
    # Queries are scaled by their positions, of which padding has some too.
    "llama4-text": lambda: newer_text("llama4_text", seed=7, floor_scale=WINDOW, **LLAMA4),
    "bloom": bloom,
    "gpt2": lambda: newer_text("gpt2"),
    "gpt-neox": lambda: newer_text("gpt_neox"),
    "nanochat": lambda: newer_text("nanochat"),
}
