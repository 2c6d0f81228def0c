"""The options of a request by name: how tokens are chosen, and how images are shown."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastvlm.decoding.sampling_params import SamplingParams
from fastvlm.functional.options import refuse_unknown
from fastvlm.vision.images import ImageOptions

SAMPLING = tuple(field.name for field in fields(SamplingParams))
SHOWING = tuple(ImageOptions.__annotations__)


def split_options(options: dict[str, Any]) -> tuple[SamplingParams, ImageOptions]:
    """Return the sampling options and those of images among options.

    Raises:
        InputError: One is unknown or out of range.
    """
    refuse_unknown(options, (*SAMPLING, *SHOWING), "there are")
    sampling = {name: options[name] for name in SAMPLING if name in options}
    shown: Any = {name: options[name] for name in SHOWING if name in options}
    return SamplingParams(**sampling), shown
