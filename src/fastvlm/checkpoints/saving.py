"""Saving a model in fastvlm's layout, or in `transformers`'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.checkpoints.layouts import transformers_name, transformers_vision_config
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import written_directory
from fastvlm.vision.fastvithd import FastViTHD

OUTPUT_LAYOUTS = ("fastvlm", "transformers")


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    output: Path,
    layout: str = "fastvlm",
) -> None:
    """Save a model and its tokenizer as a directory, which is complete or not there at all.

    Args:
        model: A `FastVlmForConditionalGeneration` around fastvlm's FastViTHD.
        tokenizer: The model's tokenizer.
        output: The directory; it must not exist.
        layout: `fastvlm`, which `transformers` loads where fastvlm is imported, or `transformers`,
            which it loads with timm.

    Raises:
        StorageError: The disk is full, or the directory can't be written.
        InputError: The output exists, or the layout doesn't support the encoder.
    """
    if output.exists():
        raise InputError(f"{output} exists already; choose another output.")
    tower = getattr(model.base_model, "vision_tower", None)
    if not isinstance(tower, FastViTHD):
        raise InputError(f"{type(model).__name__} has no FastViTHD encoder to convert.")
    vision = transformers_vision_config(tower.config) if layout == "transformers" else None
    with written_directory(output) as beside:
        _save(model, vision, beside)
        tokenizer.save_pretrained(beside)


def _save(model: PreTrainedModel, vision: dict[str, Any] | None, folder: Path) -> None:
    """Write a model's weights and configurations.

    Args:
        model: The model.
        vision: The vision tower's configuration in `transformers`' layout; None for ours.
        folder: Where to.
    """
    if vision is None:
        model.save_pretrained(folder)
    else:
        tower: Any = model.base_model.vision_tower
        form = tower.config.form
        weights = {
            transformers_name(name, form): weight
            for name, weight in model.state_dict().items()
            if not (model.config.tie_word_embeddings and name == "lm_head.weight")
        }
        save_torch_state_dict(weights, folder)
        stored = {**model.config.to_dict(), "vision_config": vision}
        stored["architectures"] = [type(model).__name__]
        (folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        model.generation_config.save_pretrained(folder)
