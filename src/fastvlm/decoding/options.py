"""The options of a request by name: how tokens are chosen, how images are shown, and when."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fastvlm.decoding.sampling_params import SamplingParams
from fastvlm.functional.errors import InputError
from fastvlm.functional.options import refuse_unknown
from fastvlm.vision.images import ImageOptions


@dataclass(frozen=True, slots=True)
class Scheduling:
    """What a request is in the engine, beside others.

    Args:
        priority: Requests of lower priority enter earlier, see `Admission`.
        cache: Whether what was kept of earlier requests is used, and this one's is kept.

    Raises:
        InputError: One is of another type.
    """

    priority: int = 0
    cache: bool = True

    def __post_init__(self) -> None:
        """Check the types."""
        if not isinstance(self.priority, int) or isinstance(self.priority, bool):
            raise InputError(f"priority is a whole number; got {self.priority!r}.")
        if not isinstance(self.cache, bool):
            raise InputError(f"cache is True or False; got {self.cache!r}.")


SAMPLING_OPTION_NAMES = tuple(field.name for field in fields(SamplingParams))
IMAGE_OPTION_NAMES = tuple(ImageOptions.__annotations__)
SCHEDULING_OPTION_NAMES = tuple(field.name for field in fields(Scheduling))


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options of a request, each with those of its kind."""

    sampling: SamplingParams
    shown: ImageOptions
    scheduling: Scheduling


def split_options(options: dict[str, Any]) -> RequestOptions:
    """Return options by their kinds.

    Raises:
        InputError: One is unknown or out of range.
    """
    kinds = SAMPLING_OPTION_NAMES, IMAGE_OPTION_NAMES, SCHEDULING_OPTION_NAMES
    refuse_unknown(options, [name for names in kinds for name in names], "there are")
    sampling, shown, scheduling = (
        {name: options[name] for name in names if name in options} for names in kinds
    )
    # Whose values are checked where images are prepared.
    images: Any = shown
    return RequestOptions(SamplingParams(**sampling), images, Scheduling(**scheduling))
