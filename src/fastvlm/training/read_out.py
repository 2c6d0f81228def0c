"""Linear maps from an encoder's features to a teacher's, and how far they are from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.training.teacher import TeacherOutputs

RIDGE = 0.3
"""The read-out's first penalty for each place or image; the features that it reads are normed."""
TEMPERATURE = 2.0
"""By which logits are divided before their softmax (Hinton et al. 2015, section 2)."""
LEAST_DEVIATION = 1e-3
"""The least deviation of a channel, as a share of the largest: some never vary."""


class ReadOut(nn.Module):
    """Linear maps of an encoder's features to a teacher's, thrown away after the training.

    They begin as a ridge regression, so that an encoder which goes on from another learns from the
    first step and isn't led astray by maps that know nothing.

    Args:
        features: What the encoder makes of some images: (batch, width, rows, columns).
        outputs: What the teacher says of them, whose mean and deviation scale the rest.
    """

    def __init__(self, features: Tensor, outputs: TeacherOutputs) -> None:
        super().__init__()
        self.width = features.shape[1]
        for name, taught in parts_of(outputs).items():
            deviation, mean = torch.std_mean(taught.flatten(0, -2), 0, correction=0)
            least = LEAST_DEVIATION * deviation.max().clamp(min=1e-12)
            self.register_buffer(f"{name}_mean", mean)
            self.register_buffer(f"{name}_deviation", deviation.clamp(min=least))
        places, whole = self.normed(features)
        targets = self.standardised(outputs)
        self.pooled = regression(whole, targets["pooled"])
        self.grid = regression(places, targets["grid"]) if "grid" in targets else None
        self.logits = None if outputs.logits is None else regression(whole, outputs.logits)

    def normed(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder's features of places, and of whole images, as they are mapped.

        Args:
            features: (batch, width, rows, columns).

        Returns:
            (batch, places, width) and (batch, width).
        """
        places = F.layer_norm(features.flatten(2).transpose(1, 2), (self.width,))
        return places, places.mean(1)

    def standardised(self, outputs: TeacherOutputs) -> dict[str, Tensor]:
        """Return the teacher's features with mean 0 and deviation 1 in each channel, by part."""
        return {
            name: (features - self.get_buffer(f"{name}_mean"))
            / self.get_buffer(f"{name}_deviation")
            for name, features in parts_of(outputs).items()
        }

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Guess a teacher's standardised features, and its logits.

        Args:
            features: (batch, width, rows, columns).

        Returns:
            `grid`, (batch, places, channels); `pooled`, (batch, channels); `logits`, (batch,
            classes). What the teacher doesn't have is left out.
        """
        places, whole = self.normed(features)
        guessed = {"pooled": self.pooled(whole)}
        if self.grid is not None:
            guessed["grid"] = self.grid(places)
        if self.logits is not None:
            guessed["logits"] = self.logits(whole)
        return guessed


def regression(inputs: Tensor, targets: Tensor) -> nn.Linear:
    """Return the linear map of least squared error, with a penalty on its weights.

    Args:
        inputs: (..., width).
        targets: (..., channels).
    """
    x, y = inputs.flatten(0, -2), targets.flatten(0, -2)
    mean, target_mean = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * len(x))
    linear = nn.Linear(x.shape[1], y.shape[1])
    with torch.no_grad():
        linear.weight.copy_(torch.linalg.solve(gram, centred.T @ (y - target_mean)).T)
        linear.bias.copy_(target_mean - linear.weight @ mean.to(linear.weight))
    return linear


def parts_of(outputs: TeacherOutputs) -> dict[str, Tensor]:
    """Return a teacher's features by part, channels last.

    `pooled` is (batch, channels), `grid` (batch, places, channels).
    """
    found = {"pooled": outputs.pooled}
    if outputs.grid is not None:
        found["grid"] = outputs.grid.flatten(2).transpose(1, 2)
    return found


def resampled(outputs: TeacherOutputs, rows: int, columns: int) -> TeacherOutputs:
    """Return a teacher's outputs with its grid averaged over the areas of another grid's places."""
    if outputs.grid is None:
        return outputs
    grid = F.interpolate(outputs.grid, (rows, columns), mode="area")
    return TeacherOutputs(grid, outputs.pooled, outputs.logits)


def distances(
    guessed: Mapping[str, Tensor], standardised: Mapping[str, Tensor], logits: Tensor | None
) -> dict[str, Tensor]:
    """Return how far guesses lie from a teacher's outputs, by part, for each image: (batch,).

    Args:
        guessed: What `ReadOut.forward` returns.
        standardised: The teacher's standardised features, by part.
        logits: The teacher's logits, if it has some.
    """
    found = {
        name: (guessed[name] - features).square().flatten(1).mean(1)
        for name, features in standardised.items()
    }
    if logits is not None:
        own, taught = (F.log_softmax(x / TEMPERATURE, -1) for x in (guessed["logits"], logits))
        divergence = F.kl_div(own, taught, reduction="none", log_target=True).sum(-1)
        found["classes"] = TEMPERATURE**2 * divergence
    return found


def joined(parts: Sequence[TeacherOutputs]) -> TeacherOutputs:
    """Return the outputs for several batches as those for one."""
    grids = [part.grid for part in parts if part.grid is not None]
    logits = [part.logits for part in parts if part.logits is not None]
    return TeacherOutputs(
        torch.cat(grids) if grids else None,
        torch.cat([part.pooled for part in parts]),
        torch.cat(logits) if logits else None,
    )
