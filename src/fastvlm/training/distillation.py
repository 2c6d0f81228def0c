"""The task of an encoder: to see in crops of images what a teacher sees in them.

Teacher and encoder are shown the same crops, mixed with one another, for long: Beyer et al. 2022
(arXiv 2106.05237) call it a consistent and patient teacher.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.data.training_images import CropMaker, ImageReference, whole_image
from fastvlm.data.workers import prepared
from fastvlm.functional.digests import digest_of_weights
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import written_into
from fastvlm.functional.placement import moved
from fastvlm.training.distillation_plan import DistillationPlan
from fastvlm.training.loop import train
from fastvlm.training.optimisation import step_random
from fastvlm.training.processes import this_process
from fastvlm.training.read_out import ReadOut, distances, joined, resampled
from fastvlm.training.schedule import Schedule
from fastvlm.training.task import ExampleStream, Losses
from fastvlm.training.teacher import Teacher, TeacherOutputs
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.loading import ImageInput

SETTLED_SHARE = 0.2
"""The share of a run, at its end, in which batch norms keep their statistics and crops are not
mixed: what is then trained is what inference computes."""
FIRST_IMAGES = 512
"""Images that the read-out is fitted to before the first step."""
MEASURED_AT_ONCE = 32
"""Images that are measured at a time."""


def shown_at(pixels: Tensor, size: int) -> Tensor:
    """Return images at another size: (batch, 3, size, size)."""
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)


class DistillationTask:
    """Teaches a FastViTHD a teacher's features: of each place, of whole images, and its logits.

    Args:
        encoder: The encoder, in the form in which it is trained.
        teacher: The teacher.
        images: What it learns from.
        schedule: The run's.
        plan: What its steps show.
        settings: More that decides what is learnt, such as a digest of the data.
    """

    def __init__(
        self,
        encoder: FastViTHD,
        teacher: Teacher,
        images: Sequence[ImageReference],
        schedule: Schedule,
        plan: DistillationPlan,
        settings: Mapping[str, Any],
    ) -> None:
        self.device = this_process().device
        self.encoder = moved(encoder, self.device, memory_format=torch.channels_last)
        self.teacher, self.images, self.schedule, self.shown = teacher, images, schedule, plan
        self.image_size = encoder.config.image_size
        self.unit = "images"
        self.source: ExampleStream | None = None
        self.norms = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)]
        self.whole = "the encoder's batch norms see all of a step" if self.norms else None
        self.plan: Mapping[str, Any] = {
            **asdict(plan),
            "image_size": encoder.config.image_size,
            **settings,
            "encoder": digest_of_weights(encoder),
            "teacher": teacher.plan,
        }
        # The larger of the two sizes, from which either is made.
        self.crops = CropMaker(max(teacher.size, self.image_size), plan.smallest_crop)
        self.size = min(plan.batch, len(images))
        self.settled_from = round((1 - SETTLED_SHARE) * schedule.steps)
        self.read_out = ReadOut(*self.first(images[:FIRST_IMAGES])).to(self.device)
        self.module: nn.Module = nn.ModuleDict({"encoder": encoder, "read_out": self.read_out})
        self._prepared: Generator[Tensor] | None = None

    @torch.no_grad()
    def first(self, images: Sequence[ImageReference]) -> tuple[Tensor, TeacherOutputs]:
        """Return what encoder and teacher make of a crop of each of some images.

        Returns:
            (batch, width, rows, columns), and the teacher's outputs at the same grid.
        """
        seed = self.schedule.seed
        crops = torch.stack([
            self.crops((f"{seed}/statistics/{number}", reference.image()))
            for number, reference in enumerate(images)
        ])  # fmt: skip
        parts = [part.to(self.device) / 255 for part in crops.split(MEASURED_AT_ONCE)]
        # In training, as the statistics of a new encoder's batch norms mean nothing yet.
        features = torch.cat([self.features(part) for part in parts])
        return features, joined([self.taught(part) for part in parts])

    def taught(self, pixels: Tensor) -> TeacherOutputs:
        """Return what the teacher says of images, at the encoder's grid.

        Args:
            pixels: (batch, 3, height, width) in [0, 1].
        """
        outputs = self.teacher(shown_at(pixels, self.teacher.size))
        side = self.image_size // REDUCTION
        return resampled(outputs, side, side)

    def draw(self, step: int) -> list[Tensor]:
        """Return a step's crops, mixed; each is (3, side, side) in [0, 1].

        Raises:
            InputError: An image can't be opened.
            LostWorkerError: A worker was killed.
        """
        if self._prepared is None:
            self._prepared = prepared(
                self.crops, self._wanted(step), workers=self.schedule.workers, ahead=self.size
            )
        crops = torch.stack(list(islice(self._prepared, self.size))).float() / 255
        settled = step >= self.settled_from
        for norm in self.norms:
            norm.train(not settled)
        if self.shown.mixup and not settled:
            alpha = torch.tensor(self.shown.mixup)
            share = torch.distributions.Beta(alpha, alpha).sample((len(crops), 1, 1, 1))
            share = torch.maximum(share, 1 - share)
            crops = share * crops + (1 - share) * crops.roll(1, 0)
        return list(crops)

    def _wanted(self, first: int) -> Iterator[tuple[str, ImageInput]]:
        """Yield what is cropped in each step to come, with a seed for each crop."""
        for step in range(first, self.schedule.steps):
            drawn = step_random(self.schedule.seed, step).sample(range(len(self.images)), self.size)
            for number in drawn:
                yield f"{self.schedule.seed}/{step}/{number}", self.images[number].image()

    def close(self) -> None:
        """End the workers; what they prepared ahead is prepared again by whoever goes on."""
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None

    def loss(self, examples: Sequence[Tensor]) -> Losses:
        """Return the losses of some crops: mean squared errors, and the divergence of classes."""
        pixels = torch.stack(list(examples)).to(self.device)
        outputs = self.taught(pixels)
        guessed = self.guessed(pixels)
        losses = distances(guessed, self.read_out.standardised(outputs), outputs.logits)
        total = torch.stack([loss.sum() for loss in losses.values()]).sum()
        number = len(examples)
        report = {name: (float(loss.detach().sum()), number) for name, loss in losses.items()}
        return Losses(total, number, report)

    def guessed(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return what the read-out makes of the encoder's features. See `ReadOut.forward`."""
        guesses: dict[str, Tensor] = self.read_out(self.features(pixels))
        return guesses

    def features(self, pixels: Tensor) -> Tensor:
        """Return the encoder's features of images: (batch, width, rows, columns)."""
        states: Tensor = self.encoder(shown_at(pixels, self.image_size)).last_hidden_state
        return states


class HeldOutImages:
    """Measures on held-out images, whole ones, how much of a teacher an encoder has learnt.

    Args:
        task: What is learnt.
        images: The images.

    Raises:
        InputError: There are fewer than two.
    """

    def __init__(self, task: DistillationTask, images: Sequence[ImageReference]) -> None:
        if len(images) < 2:  # noqa: PLR2004
            raise InputError(f"At least two images are held out; got {len(images)}.")
        self.task = task
        shown = torch.stack([whole_image(one.image(), task.crops.size) for one in images])
        self.pixels = shown.split(MEASURED_AT_ONCE)
        self.outputs = joined([task.taught(part.to(task.device)) for part in self.pixels])

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Return the measures by name.

        `explained` is the share of the variance of the teacher's features that is explained,
        over channels of deviation 1; `cosine` that between guess and teacher after the mean is
        taken off; `same class` how often both find the same class likeliest.
        """
        task = self.task
        with evaluating(task.encoder):
            parts = [task.guessed(part.to(task.device)) for part in self.pixels]
        guessed = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        measures = {}
        for name, wanted in task.read_out.standardised(self.outputs).items():
            guess, truth = guessed[name].flatten(0, -2), wanted.flatten(0, -2)
            left = (guess - truth).square().sum()
            whole = (truth - truth.mean(0)).square().sum()
            measures[f"held-out {name} explained"] = float(1 - left / whole)
            measures[f"held-out {name} cosine"] = float(F.cosine_similarity(guess, truth).mean())
        if self.outputs.logits is not None:
            same = guessed["logits"].argmax(-1) == self.outputs.logits.argmax(-1)
            measures["held-out same class"] = float(same.float().mean())
        return measures


@contextmanager
def evaluating(encoder: FastViTHD) -> Iterator[None]:
    """Use an encoder as inference does in this context."""
    modes = [(part, part.training) for part in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def distil(
    encoder: FastViTHD,
    teacher: Teacher,
    images: Sequence[ImageReference],
    held_out: Sequence[ImageReference],
    schedule: Schedule,
    plan: DistillationPlan,
    output: Path,
    data: str,
) -> dict[str, float]:
    """Teach an encoder what a teacher sees, and save it as `output`, in its form.

    Args:
        encoder: The encoder.
        teacher: The teacher.
        images: What it learns from.
        held_out: Images to measure it by.
        schedule: Length and learning rate of the run.
        plan: What its steps show.
        output: The directory of the encoder in the end, and of the checkpoint, in `training`.
        data: A digest of the data.

    Returns:
        The measures on held-out images. See `HeldOutImages`.

    Raises:
        InputError: An image can't be opened, or there are none to learn from.
        LostWorkerError: A worker was killed.
    """
    encoder.requires_grad_(True).train()
    settings = {"data": data, "held_out": len(held_out)}
    with closing(DistillationTask(encoder, teacher, images, schedule, plan, settings)) as task:
        measure = HeldOutImages(task, held_out)
        train(task, schedule, output / "training", measure)
        measures = measure(schedule.steps)
    # Where it was read from is nobody's business later.
    encoder.config.name_or_path = ""
    if this_process().is_main_process:
        with written_into(output, last="config.json") as beside:
            encoder.save_pretrained(beside)
    return measures
