"""The model, drafts and images that ship with the package, and the prompts it was trained on."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
DRAFT = FOLDER / "draft"
IMAGES = FOLDER / "images"

SCENE_PROMPT = "Describe the scene exactly."
SENTENCE_PROMPT = "Describe the picture in one sentence."
DESCRIPTION_PROMPT = "Describe the picture in several sentences."
