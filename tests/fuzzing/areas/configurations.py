"""Configurations: a model's, its generation's and its processor's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tests.fuzzing.areas.loaded import LoadedModels


class Configurations(LoadedModels):
    """See `Area`."""

    name: ClassVar[str] = "configurations"
    share: ClassVar[float] = 0.04
    files: ClassVar[Sequence[str]] = (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
    )
