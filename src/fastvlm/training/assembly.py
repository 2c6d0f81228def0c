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
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.functional.placement import on_no_device
from fastvlm.training.turn_formats import prepare_tokenizer
from fastvlm.vision.configuration import REDUCTION, FastViTHDConfig
from fastvlm.vision.fastvithd import FastViTHD

MEASURED_TOKENS = 4096
"""About how many embedded tokens a new projector's scale is measured from."""


def assemble(
    encoder: FastViTHD, decoder: Path
) -> tuple[FastVlmForConditionalGeneration, PreTrainedTokenizerBase]:
    """Return a new model in float32, and its tokenizer with a token for images.

    The tokenizer's own chat template is kept if it writes images; else it gets that of the first
    format of turns whose tokens it knows.

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
    shown_as, ends = prepare_tokenizer(processor, decoder)
    image = cast(int, processor.convert_tokens_to_ids(shown_as))
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
    with on_no_device():
        model = FastVlmForConditionalGeneration(config)
    take_over(model, encoder, text)
    scale_projector(model)
    if ends is not None:
        model.generation_config.eos_token_id = ends
    return model, processor


def take_over(
    model: FastVlmForConditionalGeneration, encoder: FastViTHD, text: PreTrainedModel
) -> None:
    """Put a trained encoder and a trained decoder into a model, and a new projector between them.

    Args:
        model: The model, which has no weights yet; changed in place.
        encoder: The vision encoder, which becomes part of the model.
        text: The language model, whose parts become the model's.
    """
    # Where they were read from is nobody's business later.
    encoder.config.name_or_path = text.config.name_or_path = ""
    projector = type(model.model.multi_modal_projector)(model.config)
    projector.apply(model._init_weights)
    model.model.multi_modal_projector = projector
    model.model.vision_tower, model.model.language_model = encoder, text.base_model
    model.config.vision_config, model.config.text_config = encoder.config, text.config
    model.lm_head = text.get_output_embeddings()
    model.tie_weights()
    model.generation_config = text.generation_config or model.generation_config


def replace_encoder(model: PreTrainedModel, encoder: FastViTHD) -> None:
    """Give a model another encoder, which its projector learns to read in further training.

    Raises:
        InputError: The model is not one around FastViTHD, or its projector reads another width.
    """
    # Which parts a composite model has is its class's matter.
    parts: Any = model.base_model
    tower = getattr(parts, "vision_tower", None)
    if not isinstance(tower, FastViTHD):
        raise InputError(f"{type(model).__name__} has no FastViTHD encoder to replace.")
    width, own = encoder.config.hidden_size, tower.config.hidden_size
    if width != own:
        raise InputError(
            f"The encoder's features are {width} wide, and the model's projector reads {own}."
        )
    encoder.config.name_or_path = ""
    parts.vision_tower = encoder.train(tower.training)
    show_images_of(model, encoder.config.image_size)


def show_images_of(model: PreTrainedModel, image_size: int) -> None:
    """Make a side in pixels the model's own."""
    tower = model.base_model.vision_tower
    assert isinstance(tower, FastViTHD)  # no other model's size is given
    tower.config.image_size = image_size
    model.config.vision_config = tower.config
    model.config.image_seq_length = (image_size // REDUCTION) ** 2


@torch.no_grad()
def scale_projector(model: FastVlmForConditionalGeneration) -> None:
    """Scale an untrained projector so that images are about as large as texts to the decoder.

    Visual tokens take the place of embedded tokens, and families differ in how large those are
    (Gemma multiplies its own by the square root of their width). The projector's last layer is
    scaled until visual tokens of noise have the root mean square of embedded tokens.

    Args:
        model: The model, changed in place.
    """
    config: Any = model.config.vision_config
    shape = (1, 3, config.image_size, config.image_size)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    tower = model.model.vision_tower
    training = tower.training
    tower.eval()
    visual = torch.cat([*model.get_image_features(noise).pooler_output])
    tower.train(training)
    embed: Any = model.get_input_embeddings()
    rows: int = embed.weight.shape[0]
    texts = embed(torch.arange(0, rows, max(1, rows // MEASURED_TOKENS)))
    scale = (texts.square().mean() / visual.square().mean()).sqrt()
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        parameter.mul_(scale)


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
