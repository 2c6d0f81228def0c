"""Drafting with some of the target's layers (Draft & Verify, Zhang et al., arXiv 2309.08168)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.strategies import Draft
from fastvlm.decoding.token_by_token import TokenByToken
from fastvlm.drafting.draft_length import DraftLength, FixedLength
from fastvlm.functional.errors import InputError
from fastvlm.language.decoder import SplitDecoder


def skipped_by_default(depth: int) -> tuple[int, ...]:
    """Return every second layer of the middle half, which is a start where nothing was searched."""
    outer = max(1, depth // 4)
    return tuple(range(outer, depth - outer, 2))


@dataclass(slots=True)
class SkippedLayers:
    """Draft with the target's own layers but for some, and the whole LM head.

    Nothing of a draft is used again: drafted tokens write keys and values of the layers that are
    kept, and the verify, which runs all layers at the same positions, overwrites them.

    Args:
        decoder: The target.
        skipped: The layers that drafting leaves out.
        length: How long a draft goes on.
        name: The strategy's name in tables.

    Raises:
        InputError: There is no such layer, or none would be left.
    """

    decoder: SplitDecoder
    skipped: Iterable[int]
    length: DraftLength = field(default_factory=FixedLength)
    name: str = "skip"
    clock: Callable[[], float] = time.perf_counter
    exit_layer: int = field(init=False, default=0)
    cache_layers: int = field(init=False, default=0)
    margin: int = field(init=False)
    kept: tuple[int, ...] = field(init=False)
    """The layers that draft."""
    _loop: TokenByToken = field(init=False)

    def __post_init__(self) -> None:
        self.skipped = tuple(sorted(set(self.skipped)))
        depth = self.decoder.depth
        if any(not 0 <= layer < depth for layer in self.skipped):
            raise InputError(
                f"The layers of this model are 0 to {depth - 1}; got"
                f" {', '.join(map(str, self.skipped))} to skip."
            )
        self.kept = tuple(layer for layer in range(depth) if layer not in self.skipped)
        if not self.kept:
            raise InputError(f"All {depth} layers were to be skipped, and none would draft.")
        self.margin = self.length.maximum
        self._loop = TokenByToken(self.length, self.clock)

    def observe(self, hidden: Tensor) -> None:
        """Nothing to learn."""

    def draft(self, batch: Batch, limits: list[int]) -> Draft:
        """Draft token by token, until the rule for the draft's length ends it."""
        starts = batch.cache.lengths

        def guess(last: list[int], step: int) -> Tensor:
            span = batch.cache.span([start + step for start in starts], 1)
            x = self.decoder.embed(torch.tensor(last, device=self.decoder.device)[:, None])
            x = self.decoder.run(x, span, batch.cache, self.kept)
            return self.decoder.head(x)[:, -1]

        return Draft(self._loop.draft(batch, limits, 0, guess))

    def commit(self, hidden: Tensor | None, accepted: list[int]) -> None:  # noqa: ARG002
        """Tell the rule for the draft's length what was accepted."""
        self._loop.commit(accepted)

    def finish(self, tokens: int) -> None:
        """Tell the rule for the draft's length how long a reply was."""
        self.length.finish(tokens)

    def keep(self, rows: list[int]) -> None:
        """Nothing to forget."""
