"""What a step of a model's training shows: conversations about scenes and photos."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlm.data.captioned import CaptionedImage
from fastvlm.data.conversations import Conversation
from fastvlm.prompts.messages import question
from fastvlm.vision.loading import ImageInput
from fastvlm_example import HELD_OUT_SCENES
from fastvlm_example.scenes import Scene, describe, render, sample
from recipe.augmentation import random_crops
from recipe.descriptions import described_by, sentences_of
from recipe.wordings import wording

SCENE_REQUESTS = {"scene": 7, "description": 2, "sentence": 1}
"""How often a scene is asked about in the words of each kind."""
SCENE_SHARE = 0.05
"""How often a photo is asked about in the words of scenes."""


class Said(NamedTuple):
    """A request and its reply.

    Args:
        kind: The kind of the reply: `scene`, `sentence` or `description`.
        prompt: The request.
        reply: The reply.
    """

    kind: str
    prompt: str
    reply: str


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
    return [conversation(about_scene(scene, shortened), render(scene, size)) for scene in scenes]


def draw_photos(photos: DecodedPhotos, number: int, size: int) -> list[Conversation]:
    """Return two conversations about each of some photos."""
    drawn = photos.draw(number, size) if number else ()
    return [
        conversation(said, image)
        for row, image in drawn
        for said in about_photo(photos.photos[row].captions)
    ]


def about_scene(scene: Scene, shortened: float) -> Said:
    """Return a request about a scene, in the words of any kind, and the reply."""
    [asked] = random.choices(*zip(*SCENE_REQUESTS.items(), strict=True))
    text = described(scene, shortened)
    return Said("scene", wording(asked), sentences_of(text)[0] if asked == "sentence" else text)


def described(scene: Scene, shortened: float) -> str:
    """Return a scene's description, or with that probability only up to its last thing."""
    text = describe(scene)
    if random.random() < shortened:
        return ".".join(text.split(".")[: 1 + len(scene.things)]) + "."
    return text


def about_photo(captions: Sequence[str]) -> list[Said]:
    """Return two requests about a photo with their replies: a description, and one caption.

    A photo whose captions all say the same has no description, and a second caption instead.

    Args:
        captions: The photo's captions, the most typical first.
    """
    # The captions that agree most with the others teach what most people would say.
    two = [Said("sentence", wording("sentence"), random.choice(captions[:3])) for _ in range(2)]
    text = described_by(captions)
    if len(sentences_of(text)) == 1:
        return two
    # "Describe the scene" is said of photos, too.
    asked = "scene" if random.random() < SCENE_SHARE else "description"
    return [Said("description", wording(asked), text), two[0]]


def conversation(said: Said, image: ImageInput) -> Conversation:
    """Return a conversation about an image; its name is the kind of its reply."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": said.reply}]}
    return Conversation(said.kind, (*question(said.prompt, image), answer))
