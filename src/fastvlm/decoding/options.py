"""The options of a request by name: how tokens are chosen, and how images are shown."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastvlm.decoding.sampling_params import SamplingParams
from fastvlm.functional.options import refuse_unknown
from fastvlm.vision.images import ImageOptions

SAMPLING_OPTION_NAMES = tuple(field.name for field in fields(SamplingParams))
IMAGE_OPTION_NAMES = tuple(ImageOptions.__annotations__)


def split_options(options: dict[str, Any]) -> tuple[SamplingParams, ImageOptions]:
    """Return the sampling options and those of images among options.

    Raises:
        InputError: One is unknown or out of range.
    """
    refuse_unknown(options, (*SAMPLING_OPTION_NAMES, *IMAGE_OPTION_NAMES), "there are")
    sampling = {name: options[name] for name in SAMPLING_OPTION_NAMES if name in options}
    shown: Any = {name: options[name] for name in IMAGE_OPTION_NAMES if name in options}
    return SamplingParams(**sampling), shown
