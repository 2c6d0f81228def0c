"""Tiny models for the runtimes, with weights large enough that their replies vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from fastvlm.language import DecoderInputs, SplitDecoder
from tests.families import DEPTH
from tests.language.decoding import decode, strategy

VOCABULARY, WIDTH, WINDOW = 99, 64, 8
LIMIT = 12
"""Tokens of a reply."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": False,
    "layer_types": ["full_attention", *["sliding_attention"] * (DEPTH - 1)],
}
CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": Gemma2Config(**SHAPE, **WINDOWS),
    "gemma3": Gemma3TextConfig(**SHAPE, **WINDOWS),
    "phi3": Phi3Config(**SHAPE),
    "olmo2": Olmo2Config(**SHAPE),
    "stablelm": StableLmConfig(**SHAPE),
}
"""Of families that ONNX Runtime decodes."""
OTHERS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    "mixtral": MixtralConfig(**SHAPE),
    "smollm3": SmolLM3Config(**SHAPE),
}
"""Of families that it doesn't."""


def tiny(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(4)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return made


def prompts(decoder: SplitDecoder, lengths: Sequence[int]) -> list[DecoderInputs]:
    made = torch.Generator().manual_seed(2)
    each = [torch.randint(3, VOCABULARY, (length,), generator=made) for length in lengths]
    return [
        DecoderInputs(ids.tolist(), decoder.embed(ids[None].to(decoder.device))[0].detach())
        for ids in each
    ]


def replies(
    decoder: SplitDecoder, name: str, given: Sequence[DecoderInputs], limit: int = LIMIT
) -> list[list[int]]:
    done = decode(decoder, strategy(name, decoder), given, limit, ends=())
    return [request.output_token_ids for request in done]


@pytest.fixture(scope="module")
def qwen() -> PreTrainedModel:
    return tiny(CONFIGURATIONS["qwen2"])
