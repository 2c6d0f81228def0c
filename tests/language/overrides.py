"""What the rules for tiny models don't know of single model types."""

from __future__ import annotations

from typing import Any

from tests.models import small_encoder_config

SECTIONS = {"rope_parameters": {"mrope_section": [2, 3, 3]}}
"""The shares of a small head's pairs that turn with time, height and width."""
ROTARY = {"rope_type": "default", "rope_theta": 1e4}
SPARSE = ["dense", "sparse", "sparse", "sparse"]
GLOBAL = {"head_dim": 32}
SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "per_layer_config": {"1": GLOBAL, "3": GLOBAL},
}
IMAGE_WORDS = {"<image>": 90, "<|extra_200|>": 91, "IMGIMGAZ": 92}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 32},
    "chameleon": {"vocabulary_map": IMAGE_WORDS},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {**ROTARY, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}},
    "deepseek_ocr2_text": {"mlp_layer_types": SPARSE},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": IMAGE_WORDS},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "falcon_h1": {"mamba_d_head": 32},
    "fast_vlm": {"vision_config": small_encoder_config().to_dict()},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma4_text": SHARED,
    "gemma4_unified_text": SHARED,
    "diffusion_gemma_text": SHARED,
    "glm5_next_text": {"index_kpool": 4},
    "granite4_vision": {"deepstack_layer_map": [[-2, 1]], "spatial_target_layers": [2, 3]},
    "granitemoehybrid": {"mamba_d_head": 32},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 64}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_vl_text": SECTIONS,
    "glm4v_text": SECTIONS,
    "glm_ocr_text": SECTIONS,
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [1, 1, 2]}},
    "paddleocr_vl_text": SECTIONS,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 128},
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""Fields by the model type of the configuration that has them; `...` takes a field away.

`default` has the fields that the configuration is first made with, before it is shrunk.
"""
SINGLE: frozenset[str] = frozenset({"inkling2", "inkling2_text"})
"""Model types that compute in float32 whatever their weights are."""
