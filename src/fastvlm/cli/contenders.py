"""The model and the strategies to benchmark, audit or evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm.cli.loading import ModelOption, Runtime, SkippedLayersOption, layers_in
from fastvlm.cli.strategies import (
    LAYER_SEARCH_IMAGES,
    DraftsOption,
    StrategiesOption,
    TypedStrategy,
    chosen_strategies,
    named_drafts,
    named_strategies,
    needs_search,
)
from fastvlm.cli.terminal import print_error
from fastvlm.example import example
from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    from fastvlm.decoding import Strategy
    from fastvlm.vision.loading import ImageInput
    from fastvlm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Contenders:
    """A model and the strategies to decode it with, as typed.

    Args:
        model: The model's directory, or its name on the hub; None for the example model.
        draft: Drafts, `NAME=DIR`.
        strategies: Names separated by commas; None for all strategies.
        skipped_layers: Layers separated by commas; None to search for them.
    """

    model: ModelOption = None
    draft: DraftsOption = None
    strategies: StrategiesOption = None
    skipped_layers: SkippedLayersOption = None

    @property
    def drafts(self) -> dict[str, Path]:
        """The drafts' directories by the names of their strategies."""
        return named_drafts(self.draft, self.model)

    @property
    def chosen(self) -> list[TypedStrategy]:
        """The strategies."""
        return chosen_strategies(self.strategies, self.drafts)

    @property
    def skipped(self) -> tuple[int, ...] | None:
        """The layers to skip, if given."""
        return layers_in(self.skipped_layers)

    def check(self) -> bool:
        """Return whether the layers to skip have to be searched for.

        Raises:
            UsageError: A strategy, a draft's name or a layer is invalid.
        """
        return needs_search(self.chosen, self.skipped)

    def load(self, runtime: Runtime, *, max_slots: int | None = None) -> VisionLanguageModel:
        """Load the model; its drafts are loaded later, each under its own name.

        Raises:
            CheckpointError: The model is missing or broken.
            InputError: The model's family is not supported.
        """
        where = example().MODEL if self.model is None else self.model
        return runtime.load(where, max_slots=max_slots)

    def skipped_layers_for(
        self, vlm: VisionLanguageModel, asked: Iterable[tuple[str, ImageInput | None]]
    ) -> tuple[int, ...] | None:
        """Return the layers to skip: those given, or those found on replies to the first questions.

        None for the strategy's default; if the replies are too short to search on, a message says
        so.

        Args:
            vlm: The model.
            asked: Prompts and images, of which the first few are used.
        """
        if not self.check():
            return self.skipped
        prompts, images = zip(*islice(asked, LAYER_SEARCH_IMAGES), strict=True)
        try:
            return vlm.find_skipped_layers(prompts, images).skipped
        except InputError as error:
            print_error(f"{str(error).rstrip('.')}; layer-skip skips its usual layers.")
            return None

    def strategies_of(
        self, vlm: VisionLanguageModel, skipped: Sequence[int] | None
    ) -> dict[str, Strategy]:
        """Return the strategies by name.

        Args:
            vlm: The model.
            skipped: The layers that layer-skip leaves out; None for its default.

        Raises:
            CheckpointError: A draft is missing, broken or made for another model.
            UsageError: A setting is out of range.
        """
        return named_strategies(vlm, self.chosen, self.drafts, skipped)
