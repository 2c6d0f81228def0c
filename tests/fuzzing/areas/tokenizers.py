"""Tokenizers and chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tests.fuzzing.areas.loaded import LoadedModels
from tests.fuzzing.models import FASTVITHD


class Tokenizers(LoadedModels):
    """See `Area`."""

    name: ClassVar[str] = "tokenizers"
    share: ClassVar[float] = 0.03
    models: ClassVar[Sequence[str]] = (FASTVITHD, "llama", "llava")
    files: ClassVar[Sequence[str]] = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    )
