"""What an encoder is shown by a distillation: settings of Python and of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastvlm.functional.options import Option


@dataclass(frozen=True, slots=True)
class DistillationPlan:
    """What the steps of a distillation show.

    Args:
        batch: Crops in a step; if there are fewer images, one of each.
        smallest_crop: The least share of each of an image's sides that a crop shows.
        mixup: Both parameters of the Beta distribution that decides how evenly pairs of crops are
            mixed (mixup, arXiv 1710.09412); 0 for crops of one image each.
    """

    batch: Annotated[int, Option("Crops in a step.", "N", 1, 1_000_000)] = 64
    smallest_crop: Annotated[
        float,
        Option("The least share of each of an image's sides that a crop shows.", "X", 0.01, 1),
    ] = 0.5
    mixup: Annotated[
        float,
        Option("How evenly pairs of crops are mixed: Beta(X, X). 0 for no mixing.", "X", 0, 100),
    ] = 0.4
