"""Save a model in our layout, or in `transformers`'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.checkpoints.layouts import transformers_name, transformers_vision_config
from fastvlm.functional.errors import InputError
from fastvlm.vision.fastvithd import FastViTHD

LAYOUTS = ("fastvlm", "transformers")


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    output: Path,
    layout: str = "fastvlm",
) -> None:
    """Save a model and its tokenizer as a directory, written beside and then renamed.

    Args:
        model: A `FastVlmForConditionalGeneration` around our FastViTHD.
        tokenizer: Its tokenizer.
        output: The directory; it must not exist.
        layout: `fastvlm`, which `transformers` loads where fastvlm is imported, or `transformers`,
            which it loads with timm.

    Raises:
        InputError: The output exists, or the layout has no place for the encoder.
    """
    if output.exists():
        raise InputError(f"{output} exists already; choose another output.")
    tower = getattr(model.base_model, "vision_tower", None)
    if not isinstance(tower, FastViTHD):
        raise InputError(f"{type(model).__name__} has no FastViTHD encoder to convert.")
    vision = transformers_vision_config(tower.config) if layout == "transformers" else None
    beside = output.with_name(output.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if vision is None:
        model.save_pretrained(beside)
    else:
        weights = {
            transformers_name(name, tower.config.form): weight
            for name, weight in model.state_dict().items()
            if not (model.config.tie_word_embeddings and name == "lm_head.weight")
        }
        save_torch_state_dict(weights, beside)
        stored = {**model.config.to_dict(), "vision_config": vision}
        stored["architectures"] = [type(model).__name__]
        (beside / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        model.generation_config.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(output)
