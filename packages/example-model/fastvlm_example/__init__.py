"""The example model of fastvlm, its drafts and images, and the prompts that it was trained on."""

from pathlib import Path

from fastvlm_example import scenes

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
DRAFT = FOLDER / "draft"
DRAFT_MLP = FOLDER / "draft-mlp"
IMAGES = FOLDER / "images"

SCENE_PROMPT = "Describe the scene exactly."
SENTENCE_PROMPT = "Describe the picture in one sentence."
DESCRIPTION_PROMPT = "Describe the picture in several sentences."

HELD_OUT_SCENES = 1_000_000_000
"""Scenes with seeds from here on are in no training data."""

__all__ = [
    "DESCRIPTION_PROMPT",
    "DRAFT",
    "DRAFT_MLP",
    "FOLDER",
    "HELD_OUT_SCENES",
    "IMAGES",
    "MODEL",
    "SCENE_PROMPT",
    "SENTENCE_PROMPT",
    "scenes",
]
