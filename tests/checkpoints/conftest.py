"""Small FastVLM checkpoints in Apple's layout and in transformers', weights drawn from names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fastvlm.vision.configuration import VARIANTS
from fastvlm_example.scenes import describe, sample
from tests.checkpoints.reference import SMALL, all_drawn, apple_name, read_fixture

WIDTH, VOCABULARY, SIZE = 32, 320, 192
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
FORM = "reparameterized"
"""The form of what Apple has released."""


@pytest.fixture
def small_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the released encoder be a small one."""
    monkeypatch.setitem(VARIANTS, "fastvithd", {**SMALL, "image_size": 1024})


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with Qwen2's special tokens and none for images."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([describe(sample(seed)) for seed in range(20)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def decoder_weights(tied: bool) -> dict[str, Tensor]:
    """Return the weights of a small Qwen2, under its own names."""
    with torch.device("meta"):
        shell = Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=tied))
    shapes = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    return all_drawn(shapes)


def projector_weights() -> dict[str, Tensor]:
    """Return the weights of the projector, by its two layers."""
    seen = 2 * SMALL["widths"][-1]
    return all_drawn(
        {
            "1.weight": (WIDTH, seen),
            "1.bias": (WIDTH,),
            "2.weight": (WIDTH, WIDTH),
            "2.bias": (WIDTH,),
        }
    )


def encoder_weights() -> dict[str, Tensor]:
    """Return the weights of the small encoder, under timm's names."""
    return all_drawn(read_fixture()[FORM]["small"])


def apple_weights(tied: bool = True) -> dict[str, Tensor]:
    """Return a whole checkpoint's weights, under Apple's names."""
    tower = "model.vision_tower.vision_tower.model."
    projector = projector_weights()
    return {
        **decoder_weights(tied),
        **{
            f"model.mm_projector.{2 * layer}.{kind}": projector[f"{layer + 1}.{kind}"]
            for layer in (0, 1)
            for kind in ("weight", "bias")
        },
        **{tower + apple_name(name): weight for name, weight in encoder_weights().items()},
        tower + "head.proj": torch.zeros(128, 8),
    }


def transformers_weights(tied: bool = True) -> dict[str, Tensor]:
    """Return a whole checkpoint's weights, under the names of transformers' layout."""
    decoder = {
        name.replace("model.", "model.language_model.", 1): weight
        for name, weight in decoder_weights(tied).items()
    }
    projector = {
        f"model.multi_modal_projector.linear_{name}": weight
        for name, weight in projector_weights().items()
    }
    encoder = {
        f"model.vision_tower.timm_model.{name}": weight
        for name, weight in encoder_weights().items()
    }
    return {**decoder, **projector, **encoder}


def write_apple(folder: Path, *, tied: bool = True, **changes: Any) -> Path:
    """Write a checkpoint in Apple's layout, in several shards."""
    config = {
        **TEXT,
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "mm_vision_tower": f"mobileclip_l_{SIZE}",
        "mm_hidden_size": 3072,
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "tie_word_embeddings": tied,
        "rope_theta": 1000000.0,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **changes,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_torch_state_dict(apple_weights(tied), folder, max_shard_size="100KB")
    chatml_tokenizer().save_pretrained(folder)
    return folder


def write_transformers(folder: Path, *, tied: bool = True, **changes: Any) -> Path:
    """Write a checkpoint in transformers' layout."""
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = "{% for m in messages %}<image>{{ m['content'] }}{% endfor %}"
    vision = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "hidden_size": 3072}
    config = {
        "model_type": "fast_vlm",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": (SIZE // 64) ** 2,
        "text_config": {**TEXT, "model_type": "qwen2", "rope_theta": 1000000.0},
        "vision_config": {**vision, "model_args": {"inference_mode": True}},
        "tie_word_embeddings": tied,
        **changes,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_torch_state_dict(transformers_weights(tied), folder)
    tokenizer.save_pretrained(folder)
    return folder
