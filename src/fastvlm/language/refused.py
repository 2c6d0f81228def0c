"""Model types that are refused by name, and what is decoded in their place.

What can't be seen in a model without weights is seen once it has them, by running it
(`verification`). These types never pass that check, so nobody has to wait for their weights to be
told so; the scan of all families says which they are (`tests/language/scan.py`).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError

REFUSED: dict[str, str] = {
    "doge": "its layers choose by their own states which positions they see",
    "gemma4": "its layers take an embedding each and share keys and values",
    "gemma4_text": "its layers take an embedding each and share keys and values",
    "hunyuan_vl": "its positions have four axes",
    "muse_glimmer": "its LM head's outputs are changed in a way of its own",
    "muse_spark": "its LM head's outputs are changed in a way of its own",
    "nllb-moe": "its decoder adds positions to embeddings in a way of its own",
    "pegasus_x": "its decoder adds positions to embeddings in a way of its own",
    "seamless_m4t": "its decoder adds positions to embeddings in a way of its own",
    "seamless_m4t_v2": "its decoder adds positions to embeddings in a way of its own",
    "t5gemma2": "its layers attend to the source and the reply at once",
    "xglm": "its decoder adds positions to embeddings in a way of its own",
}
"""Why, by the model type of the whole model."""

RELATIVES: dict[str, str] = {
    "axk2": "axk1",
    "bailing_hybrid": "deepseek_v3",
    "bamba": "llama",
    "bert": "gpt2",
    "bigbird_pegasus": "pegasus",
    "deepseek_v32": "deepseek_v3",
    "deepseek_v4": "deepseek_v3",
    "doge": "llama",
    "dots3_note": "dots1",
    "dots3_note_text": "dots1",
    "falcon_h1": "falcon",
    "falcon_mamba": "falcon",
    "gemma3n_text": "gemma3_text",
    "gemma4": "gemma3",
    "gemma4_text": "gemma3_text",
    "gemma4_unified": "gemma3",
    "gemma4_unified_text": "gemma3_text",
    "glm5_next": "glm4_moe",
    "glm_moe_dsa": "glm4_moe",
    "granitemoehybrid": "granitemoe",
    "hunyuan_vl": "qwen2_5_vl",
    "hy_v4": "hy_v3",
    "jamba": "mixtral",
    "kimi_linear": "deepseek_v3",
    "led": "bart",
    "lfm2": "llama",
    "lfm2_moe": "olmoe",
    "lfm2_vl": "smolvlm",
    "lfm3": "llama",
    "lfm3_vl": "smolvlm",
    "mamba": "gpt_neox",
    "mamba2": "gpt_neox",
    "minicpmv4_6": "qwen2_5_vl",
    "minicpmv4_7": "qwen2_5_vl",
    "minimax": "minimax_m2",
    "mistral_large4": "mistral4",
    "modernbert-decoder": "llama",
    "mpt": "bloom",
    "muse_glimmer": "gemma3",
    "muse_spark": "gemma3",
    "mvp": "bart",
    "nemotron_h": "nemotron",
    "nllb-moe": "m2m_100",
    "olmo_hybrid": "olmo3",
    "openai-gpt": "gpt2",
    "pegasus_x": "pegasus",
    "qwen2_5_omni": "qwen2_5_omni_thinker",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_moe": "qwen3_vl_moe",
    "qwen3_5_moe_text": "qwen3_moe",
    "qwen3_5_text": "qwen3",
    "qwen3_next": "qwen3_moe",
    "qwen3_omni_moe": "qwen3_omni_moe_thinker",
    "qwen4_exp": "qwen3_vl",
    "qwen4_exp_text": "qwen3",
    "recurrent_gemma": "gemma2",
    "rwkv": "gpt_neox",
    "seamless_m4t": "m2m_100",
    "seamless_m4t_v2": "m2m_100",
    "switch_transformers": "t5",
    "t5gemma2": "t5gemma",
    "udop": "t5",
    "whisper": "qwen2_audio",
    "xglm": "bloom",
    "zamba": "llama",
    "zamba2": "llama",
}
"""The nearest family that is decoded, for those that have one."""


def check_name(model: PreTrainedModel) -> None:
    """Refuse a model of a type that is known to fail once it is run.

    Raises:
        InputError: It is of such a type.
    """
    name = model.config.model_type
    if reason := REFUSED.get(name):
        raise InputError(
            f"fastvlm can't split {name}: {reason}. Decode it with transformers' own generate."
        )


def with_relative(model: PreTrainedModel, error: InputError) -> InputError:
    """Return the refusal of a model with the nearest family that is decoded, if there is one."""
    name = RELATIVES.get(model.config.model_type)
    if name is None:
        return error
    return InputError(f"{error} The nearest family that fastvlm decodes is {name}.")
