"""The encoder's own task, before any text: the facts of scenes and the words of captions.

Captions alone teach an encoder slowly. What a rendered scene shows is known for each of its nine
places, and what a photo shows is told by the words that its captions share.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.data.captioned import CaptionedImage, decode, read_flickr8k, words_of
from fastvlm.functional.digests import digest, digest_of_weights
from fastvlm.functional.files import written_into
from fastvlm.functional.placement import moved
from fastvlm.training.assembly import read_encoder
from fastvlm.training.loop import train
from fastvlm.training.processes import this_process
from fastvlm.training.schedule import Schedule
from fastvlm.training.task import ExampleStream, Losses
from fastvlm.vision.configuration import FastViTHDConfig
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.images import to_tensor
from fastvlm_example import HELD_OUT_SCENES
from fastvlm_example.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    by_place,
    render,
    sample,
)
from recipe.augmentation import mixed, random_crops

SCENE_SIZE = 192
PHOTO_SIZE = 128


def scene_pixels(scenes: Sequence[Scene], size: int) -> Tensor:
    """Return scenes as images: (scenes, 3, size, size) in [0, 1]."""
    return torch.stack([to_tensor(render(scene, size)) for scene in scenes])


def frequent_words(photos: Sequence[CaptionedImage], least: int) -> list[str]:
    """Return the words that occur in the captions of at least so many photos."""
    counts: Counter[str] = Counter()
    for photo in photos:
        counts.update(words_of(" ".join(photo.captions)))
    return sorted(word for word, count in counts.items() if count >= least)


class Heads(nn.Module):
    """Linear read-outs of the encoder's features, thrown away after this task."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.shape = nn.Linear(width, len(SHAPES) + 1)
        self.colour = nn.Linear(width, len(COLOURS))
        self.size = nn.Linear(width, len(SIZES))
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.words = nn.Linear(width, words)


@dataclass(frozen=True, slots=True)
class Shown:
    """What one step of the task shows.

    Args:
        scenes: Scenes, whose facts are read.
        crops: Photos as (photos, 3, height, width).
        targets: How common each word is in their captions: (photos, words).
        settled: Whether batch norms keep the statistics that they have.
    """

    scenes: Sequence[Scene]
    crops: Tensor
    targets: Tensor
    settled: bool


class EncoderTask:
    """Teaches a FastViTHD the facts of scenes and the words of photos' captions.

    Args:
        encoder: The encoder, in either form.
        photos: Photos with captions.
        steps: Steps of the run.
        knows_scenes: Whether scenes need only be kept in memory from the first step on.
    """

    def __init__(
        self,
        encoder: FastViTHD,
        photos: Sequence[CaptionedImage],
        *,
        steps: int,
        knows_scenes: bool = False,
    ) -> None:
        self.device = this_process().device
        self.encoder = moved(encoder, self.device, memory_format=torch.channels_last).train()
        self.unit = "images"
        self.plan: Mapping[str, Any] = {
            "encoder": digest_of_weights(encoder),
            "photos": digest([[p.path, p.captions] for p in photos]),
            "knows_scenes": knows_scenes,
        }
        self.source: ExampleStream | None = None
        self.whole: str | None = "the encoder's batch norms see all of a step"
        self.photos = photos
        self.scenes_first = 0 if knows_scenes else steps // 3
        self.settled_from = 7 * steps // 10
        words = frequent_words(photos, 30)
        self.heads = Heads(encoder.config.hidden_size, len(words))
        self.module: nn.Module = nn.ModuleDict({"encoder": self.encoder, "heads": self.heads})
        index = {word: number for number, word in enumerate(words)}
        self.targets = torch.zeros(len(photos), len(words))
        for row, photo in enumerate(photos):
            for caption in photo.captions:
                for word in words_of(caption) & index.keys():
                    self.targets[row, index[word]] += 1 / len(photo.captions)
        # A log-odds start saves the steps that would only learn how common each word is.
        common = self.targets.mean(0).clamp(1e-3, 1 - 1e-3)
        self.heads.words.bias.data = torch.log(common / (1 - common))
        self.heads.to(self.device)
        self.pixels = decode(photos, 160)

    def draw(self, step: int) -> list[Shown]:
        """Return what a step shows."""
        # Scenes are learnt within a third of the run; after it they are only kept in memory.
        first = step < self.scenes_first
        scenes = [sample(random.randrange(HELD_OUT_SCENES)) for _ in range(32 if first else 8)]
        rows = torch.randint(len(self.photos), (64 if first else 80,))
        crops = random_crops(self.pixels[rows], PHOTO_SIZE)
        crops, targets = mixed(crops, self.targets[rows])
        return [Shown(scenes, crops, targets, settled=step >= self.settled_from)]

    def loss(self, examples: Sequence[Shown]) -> Losses:
        """Return the facts' and the words' loss of one step, times its images."""
        [shown] = examples
        # While it learns, a BatchNorm sees scenes or photos alone, but its statistics are
        # those of both. The last steps are taken with these, as all later use is.
        for part in self.encoder.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.train(not shown.settled)
        facts, things = self.facts(shown.scenes)
        words = self.words(shown.crops.to(self.device), shown.targets.to(self.device))
        images = len(shown.scenes) + len(shown.crops)
        measures = {"facts": facts, "things": things, "words": words}
        report = {name: (float(value.detach()), 1.0) for name, value in measures.items()}
        return Losses((facts + words) * images, images, report)

    def features(self, pixels: Tensor) -> Tensor:
        """Return (batch, positions, width) normalised features."""
        states = self.encoder(pixels).last_hidden_state
        return self.heads.norm(states.flatten(2).transpose(1, 2))

    def words(self, crops: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the captions' words, summed over words."""
        logits = self.heads.words(self.features(crops).mean(1))
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.sum(1).mean() / 10

    def facts(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        """Return the loss of the scenes' facts, and the share of things read right."""
        features = self.features(scene_pixels(scenes, SCENE_SIZE).to(self.device))
        things = [thing for scene in scenes for thing in by_place(scene)]
        shape = self.classes(0 if t is None else 1 + SHAPES.index(t.shape) for t in things)
        there = shape > 0
        colour = self.classes(COLOURS.index(t.colour) for t in things if t is not None)
        size = self.classes(SIZES.index(t.size) for t in things if t is not None)
        background = self.classes(BACKGROUNDS.index(scene.background) for scene in scenes)
        cells = features.flatten(0, 1)
        guesses = (
            self.heads.shape(cells),
            self.heads.colour(cells[there]),
            self.heads.size(cells[there]),
        )
        behind = self.heads.background(features.mean(1))
        loss = sum(
            (
                F.cross_entropy(guess, truth)
                for guess, truth in zip(
                    (*guesses, behind), (shape, colour, size, background), strict=True
                )
            ),
            start=features.new_zeros(()),
        )
        exact = (
            (guesses[0].argmax(-1)[there] == shape[there])
            & (guesses[1].argmax(-1) == colour)
            & (guesses[2].argmax(-1) == size)
        )
        return loss, exact.float().mean()

    def classes(self, numbers: Iterable[int]) -> Tensor:
        """Return what a head should find."""
        return torch.tensor(list(numbers), device=self.device)


def train_encoder(
    photos: Path,
    output: Path,
    schedule: Schedule,
    *,
    variant: str = "fastvithd-small",
    start: Path | None = None,
) -> None:
    """Train a FastViTHD and save it as `output`, in the form in which it was trained.

    Args:
        photos: A folder in Flickr8k's layout.
        output: The directory of the checkpoint while it runs, and of the encoder in the end.
        schedule: Length and learning rate of the run.
        variant: A row of `fastvlm.vision.VARIANTS`, for a new encoder.
        start: An encoder to go on from, or a model with one; None for a new one, from scratch.

    Raises:
        CheckpointError: There is no encoder to go on from.
    """
    torch.manual_seed(schedule.seed)
    encoder = FastViTHD(FastViTHDConfig.variant(variant)) if start is None else read_encoder(start)
    encoder.requires_grad_(True)
    images = read_flickr8k(photos, "train")
    task = EncoderTask(encoder, images, steps=schedule.steps, knows_scenes=start is not None)
    train(task, schedule, output)
    if this_process().is_main_process:
        with written_into(output, last="config.json") as beside:
            encoder.save_pretrained(beside)
