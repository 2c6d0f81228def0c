"""Load a model and what prepares its inputs, whatever layout they are stored in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from fastvlm.checkpoints.layouts import APPLE, CHATML, IMAGE, Layout, recognise
from fastvlm.checkpoints.processors import load_processor
from fastvlm.checkpoints.weights import read_weights
from fastvlm.functional.errors import CheckpointError, FastVlmError, first_line
from fastvlm.functional.placement import moved
from fastvlm.vision.fastvithd import FastViTHD

NAMED = 3
"""How many wrong weights an error names."""


def load_checkpoint(
    model: str | Path, dtype: torch.dtype, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """Load a model and what prepares its inputs: Apple's FastVLM, or what `transformers` loads.

    That is its processor, but the tokenizer alone for a model of text or one around FastViTHD.

    Parameters are those of the files; nothing is folded.

    Args:
        model: A directory, or a name on the Hugging Face hub.
        dtype: The precision.
        device: The device.

    Raises:
        CheckpointError: There is no model there, or a weight is missing, left over or misshapen.
        InputError: It is of a layout that is known, but has an encoder that is not.
    """
    path = Path(model)
    looks_local = isinstance(model, Path) or path.exists() or os.fspath(model).count("/") != 1
    if looks_local and not (path / "config.json").is_file():
        raise CheckpointError(f"There is no model in {path}: config.json is missing.")
    try:
        folder = path if looks_local else Path(snapshot_download(str(model)))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        layout = recognise(config)
        if layout is None:
            return _load_with_transformers(folder, dtype, device)
        target = moved(_load_layout(folder, layout, config, dtype), device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if layout is APPLE:
            _teach_pictures(target, tokenizer)
    except FastVlmError:
        raise
    except Exception as error:
        raise CheckpointError(f"The model {model} can't be loaded: {first_line(error)}.") from error
    return target, tokenizer


def _load_with_transformers(
    folder: Path, dtype: torch.dtype, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    options: dict[str, Any] = {"dtype": dtype}
    config = AutoConfig.from_pretrained(folder)
    shows_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if shows_pictures else AutoModelForCausalLM
    target = moved(auto.from_pretrained(folder, **options), device)
    if shows_pictures and not isinstance(
        getattr(target.base_model, "vision_tower", None), FastViTHD
    ):
        return target, load_processor(folder, config)
    return target, AutoTokenizer.from_pretrained(folder)


def _load_layout(
    folder: Path, layout: Layout, stored: dict[str, Any], dtype: torch.dtype
) -> FastVlmForConditionalGeneration:
    config, weights = layout.convert(stored, read_weights(folder))
    check_weights(folder, config, weights)
    model = FastVlmForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def check_weights(folder: Path, config: FastVlmConfig, weights: dict[str, Tensor]) -> None:
    """Refuse weights that are not exactly those of the configuration's model.

    Raises:
        CheckpointError: Some are missing, left over, or of another shape; it names them.
    """
    with torch.device("meta"):
        model = FastVlmForConditionalGeneration(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    # Neither decides anything: a counter of training, and a copy of the tied embeddings.
    free = {name for name in wanted if name.endswith(".num_batches_tracked")}
    if config.tie_word_embeddings:
        free.add("lm_head.weight")
    problems = {
        "missing": sorted(wanted.keys() - found.keys() - free),
        "left over": sorted(found.keys() - wanted.keys() - free),
        "misshapen": [
            f"{name} ({_by(found[name])}, not {_by(wanted[name])})"
            for name in sorted(wanted.keys() & found.keys())
            if wanted[name] != found[name]
        ],
    }
    said = [f"{_some(names)} {_be(names)} {what}" for what, names in problems.items() if names]
    if said:
        raise CheckpointError(
            f"The weights in {folder} are not those of its config.json: {'; '.join(said)}."
        )


def _some(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _be(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _by(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _teach_pictures(
    model: FastVlmForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Give Apple's tokenizer a token for pictures, which its code puts in as -200.

    Raises:
        CheckpointError: The embeddings have no row left for it.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    image = cast(int, tokenizer.convert_tokens_to_ids(IMAGE))
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if image >= rows:
        raise CheckpointError(
            f"The tokenizer has {image} tokens and the model {rows} embeddings: none is left for"
            " pictures."
        )
    model.config.image_token_index = image
    tokenizer.chat_template = CHATML
