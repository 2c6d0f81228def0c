"""Drafts with changed files: whatever their weights, the tokens are those without them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st

from fastvlm.drafting.directory import load_draft
from fastvlm_example.scenes import render, sample
from tests.fuzzing.area import WrongError
from tests.fuzzing.folders import Change, changed, changes
from tests.fuzzing.models import FASTVITHD, small_models


class Drafts:
    """See `Area`."""

    name: ClassVar[str] = "drafts"
    share: ClassVar[float] = 0.05

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vlm = small_models(folder)[FASTVITHD]
        self.image = render(sample(3), 64)
        self.expected = self.vlm.generate(
            "What is it?", self.image, strategy="autoregressive", max_new_tokens=12
        ).token_ids

    def cases(self) -> st.SearchStrategy[Any]:
        """See `Area`."""
        return changes(["config.json", "config.json", "model.safetensors"])

    def check(self, case: tuple[Change, ...]) -> None:
        """See `Area`."""
        place = changed(self.folder / "draft", self.folder / "changed", case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = load_draft(place, self.vlm.model)
        strategy = self.vlm.strategy("imitation", network=network)
        reply = self.vlm.generate("What is it?", self.image, strategy=strategy, max_new_tokens=12)
        if reply.token_ids != self.expected:
            raise WrongError(f"{reply.token_ids} instead of {self.expected}")
