"""Small models that cases start from: saved by `transformers`, with a draft where there is one."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvlm import load
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.tokenizer import learn_tokenizer
from tests import processors
from tests.cli.conftest import save_draft, tiny_model
from tests.families import FAMILIES

FASTVITHD, LLAVA = "fastvithd", "llava"
CORPUS = ["a small red square is above a large blue circle", "Describe the picture."] * 20


def save_fastvithd(folder: Path) -> Path:
    """Save a model around FastViTHD as `model`, and its draft as `draft`."""
    tokenizer = learn_tokenizer(CORPUS, 320)
    model = tiny_model(tokenizer, 6)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_draft(model, "block", folder / "draft")
    return folder / "model"


def save_family(family: str, folder: Path) -> Path:
    """Save a small model of a family, in float32."""
    torch.manual_seed(3)
    model, _ = FAMILIES[family]()
    model = model.float()
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    if family in processors.PROCESSORS:
        processors.PROCESSORS[family]().save_pretrained(folder)
    else:
        processors.character_tokenizer().save_pretrained(folder)
    return folder


def small_models(folder: Path) -> dict[str, VisionLanguageModel]:
    """Return loaded models by name."""
    ours = save_fastvithd(folder)
    llava = save_family(LLAVA, folder / LLAVA)
    return {FASTVITHD: load(ours, folder / "draft"), LLAVA: load(llava)}
