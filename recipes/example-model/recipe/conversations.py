"""What a step of a model's training shows: conversations about scenes and photos."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlm.data.captioned import CaptionedImage
from fastvlm.data.conversations import Conversation
from fastvlm.prompts.messages import question
from fastvlm.vision.loading import ImageInput
from fastvlm_example import DESCRIPTION_PROMPT, HELD_OUT_SCENES, SCENE_PROMPT, SENTENCE_PROMPT
from fastvlm_example.scenes import Scene, describe, render, sample
from recipe.augmentation import random_crops

PROMPTS = {
    "scene": (SCENE_PROMPT, "Describe the scene.", "What is in the scene? Describe all of it."),
    "sentence": (SENTENCE_PROMPT, "Describe the picture.", "What is in this picture?"),
    "description": (
        DESCRIPTION_PROMPT,
        "Describe the picture in detail.",
        "What is in this picture? Write several sentences.",
    ),
}


@dataclass(frozen=True, slots=True)
class DecodedPhotos:
    """Photos with captions, decoded.

    Args:
        photos: The photos, the most typical caption of each first.
        pixels: (photos, 3, height, width), uint8.
    """

    photos: Sequence[CaptionedImage]
    pixels: Tensor

    def draw(self, number: int, size: int) -> list[tuple[int, Tensor]]:
        """Return random crops of so many photos, (3, size, size) in uint8, with their indices."""
        rows = torch.randint(len(self.photos), (number,))
        crops = random_crops(self.pixels[rows], size, smallest=0.7)
        return list(zip(rows.tolist(), (crops * 255).round().byte(), strict=True))


def draw_scenes(number: int, size: int, shortened: float) -> list[Conversation]:
    """Return conversations about scenes; a share of the descriptions is `shortened`."""
    scenes = [sample(random.randrange(HELD_OUT_SCENES)) for _ in range(number)]
    return [
        conversation("scene", render(scene, size), described(scene, shortened)) for scene in scenes
    ]


def described(scene: Scene, shortened: float) -> str:
    """Return a scene's description, or with that probability only up to its last thing."""
    text = describe(scene)
    if random.random() < shortened:
        return ".".join(text.split(".")[: 1 + len(scene.things)]) + "."
    return text


def draw_photos(photos: DecodedPhotos, number: int, size: int) -> list[Conversation]:
    """Return two conversations about each of some photos: all its captions, and one of the best."""
    found: list[Conversation] = []
    for row, image in photos.draw(number, size) if number else ():
        captions = photos.photos[row].captions
        found.append(conversation("description", image, " ".join(captions)))
        # The captions that agree most with the others teach what most people would say.
        found.append(conversation("sentence", image, random.choice(captions[:3])))
    return found


def conversation(kind: str, image: ImageInput, reply: str) -> Conversation:
    """Return one of a kind's prompts about an image, and the reply; the kind is its name."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    return Conversation(kind, (*question(random.choice(PROMPTS[kind]), image), answer))
