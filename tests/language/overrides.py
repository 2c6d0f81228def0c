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
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
VISION_TOKENS = {"vision_start_token_id": 91, "vision_end_token_id": 92}
IMAGE_WORDS = {"<image>": 90, "<|extra_200|>": 91, "IMGIMGAZ": 92}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 32, "attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": 4},
    "chameleon": {"vocabulary_map": IMAGE_WORDS},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {**ROTARY, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": SPARSE},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": IMAGE_WORDS},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "mlp_layer_types": SPARSE,
        "per_layer_config": {"1": LATENT, "3": LATENT},
    },
    "falcon_h1": {"mamba_d_head": 32, "mamba_d_ssm": 128},
    "fast_vlm": {"vision_config": small_encoder_config().to_dict()},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma4_text": SHARED,
    "gemma4_unified_text": SHARED,
    "diffusion_gemma_text": {
        **SHARED,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "glm5_next_text": {"index_kpool": 4},
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 1]],
        "spatial_target_layers": [2, 3],
        "downsample_rate": "4/8",
    },
    "granitemoehybrid": {
        "mamba_d_head": 32,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_vl_text": {"rope_parameters": {"mrope_section": [2, 2, 2, 2]}},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 64, "num_filters": 8}},
    "led": {"attention_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"head_dim": 32},
    "mistral4": {"head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_vl_text": SECTIONS,
    "glm4v_text": SECTIONS,
    "glm_ocr_text": SECTIONS,
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [1, 1, 2]}},
    "paddleocr_vl_text": SECTIONS,
    "qwen2_5_omni_text": SECTIONS,
    "qwen2_5_omni_thinker": VISION_TOKENS,
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_omni_moe_thinker": VISION_TOKENS,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 128},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 8,
    },
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": dict.fromkeys(
        ["mamba_headdim", "attention_hidden_size", "attention_head_dim", "hybrid_layer_ids"], ...
    ),
}
"""Fields by the model type of the configuration that has them; `...` takes a field away.

`default` has the fields that the configuration is first made with, before it is shrunk.
"""
SINGLE: frozenset[str] = frozenset({"inkling2", "inkling2_text", "prophetnet", "xglm", "xlnet"})
"""Model types that compute in float32 whatever their weights are."""
