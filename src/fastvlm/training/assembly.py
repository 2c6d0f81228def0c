"""Assembling a new FastVLM from a FastViTHD, an untrained projector and a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastvlm.checkpoints import load_checkpoint
from fastvlm.checkpoints.layouts import CHATML_TEMPLATE, IMAGE_TOKEN
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.vision.configuration import REDUCTION, FastViTHDConfig
from fastvlm.vision.fastvithd import FastViTHD

TURN_END_TOKEN = "<|im_end|>"


def assemble(
    encoder: FastViTHD, decoder: Path
) -> tuple[FastVlmForConditionalGeneration, PreTrainedTokenizerBase]:
    """Return a new model in float32, and its tokenizer with a token for images.

    Args:
        encoder: The encoder, in the form in which it is trained further.
        decoder: A causal language model with its tokenizer.

    Raises:
        CheckpointError: The decoder can't be read.
        InputError: It is no language model of a supported family, or its tokenizer's chat template
            doesn't support images.
    """
    text, processor = load_checkpoint(decoder, torch.float32, "cpu")
    if not isinstance(processor, PreTrainedTokenizerBase) or text.base_model is text:
        raise InputError(f"{decoder} is a {type(text).__name__}; a decoder reads text alone.")
    if getattr(text.config, "vision_config", None) is not None:
        raise InputError(f"{decoder} has an encoder of its own; give it as --model.")
    ends = prepare_tokenizer(processor, decoder)
    image = cast(int, processor.convert_tokens_to_ids(IMAGE_TOKEN))
    weight = cast(Tensor, text.get_input_embeddings().weight)
    if image >= weight.shape[0]:
        text.resize_token_embeddings(len(processor))
    config = FastVlmConfig(
        vision_config=encoder.config.to_dict(),
        text_config=text.config.to_dict(),
        image_token_index=image,
        image_seq_length=(encoder.config.image_size // REDUCTION) ** 2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    model = FastVlmForConditionalGeneration(config)
    take_over(model, encoder, text)
    if ends is not None:
        model.generation_config.eos_token_id = ends
    return model, processor


def take_over(
    model: FastVlmForConditionalGeneration, encoder: FastViTHD, text: PreTrainedModel
) -> None:
    """Put a trained encoder and a trained decoder into a model.

    Args:
        model: The model, changed in place.
        encoder: The vision encoder, which becomes part of the model.
        text: The language model, whose weights are copied.
    """
    # Where they were read from is nobody's business later.
    encoder.config.name_or_path = text.config.name_or_path = ""
    model.model.vision_tower = encoder
    model.config.vision_config = encoder.config
    model.model.language_model.load_state_dict(text.base_model.state_dict())
    head: Any = text.get_output_embeddings()
    model.lm_head.load_state_dict(head.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config or model.generation_config


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, decoder: Path) -> int | None:
    """Add a token for images to a tokenizer, and Apple's chat template if its own has no images.

    Returns:
        The token that ends a turn in Apple's template; None where the tokenizer's own is kept.

    Raises:
        InputError: Its template doesn't support images, and its vocabulary lacks Apple's tokens.
    """
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    shown: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    if tokenizer.chat_template:
        try:
            text = str(tokenizer.apply_chat_template(shown, tokenize=False))
        except Exception:  # noqa: BLE001 (a template may raise anything)
            text = ""
        if text.count(IMAGE_TOKEN) == 1 and "'type'" not in text:
            return None
    end = tokenizer.get_vocab().get(TURN_END_TOKEN)
    if end is None:
        raise InputError(
            f"The chat template of {decoder} has no place for images, and its tokenizer doesn't"
            " know ChatML's tokens; set a tokenizer.chat_template that writes <image>."
        )
    tokenizer.chat_template = CHATML_TEMPLATE
    return end


def read_encoder(path: Path) -> FastViTHD:
    """Load a FastViTHD from its own directory or from a model's.

    Raises:
        CheckpointError: There is none, or it can't be read.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"There is no encoder in {path}: config.json is missing.")
    if AutoConfig.from_pretrained(path).model_type == FastViTHDConfig.model_type:
        return cast(FastViTHD, AutoModel.from_pretrained(path))
    tower = load_checkpoint(path, torch.float32, "cpu")[0].base_model.vision_tower
    if not isinstance(tower, FastViTHD):
        raise CheckpointError(f"The model in {path} has no FastViTHD encoder.")
    return tower
