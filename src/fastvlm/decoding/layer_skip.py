"""Layer skipping: drafts of the target with some of its layers left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.draft_loop import Draft, draft_loop
from fastvlm.decoding.strategies import RuledDrafting
from fastvlm.drafting.draft_length import DraftLength, FixedLength
from fastvlm.functional.errors import InputError
from fastvlm.language.decoder import SplitDecoder


@dataclass(eq=False)
class LayerSkip(RuledDrafting):
    """Draft with some of the target's own layers (Draft & Verify, arXiv 2309.08168).

    Nothing of a draft is reused: drafted tokens write keys and values of the layers that are kept,
    and the verify, which runs all layers at the same positions, overwrites them.

    Args:
        decoder: The target.
        skipped: The layers that drafting leaves out.
        length: The rule for the draft length.
        name: The strategy's name in tables.

    Raises:
        InputError: There is no such layer, or none would be left.
    """

    decoder: SplitDecoder
    skipped: Iterable[int]
    length: DraftLength = field(default_factory=FixedLength)
    name: str = "layer-skip"
    exit_layer: int = field(init=False, default=0)
    cache_layers: int = field(init=False, default=0)
    kept: tuple[int, ...] = field(init=False)
    """The layers that draft."""

    def __post_init__(self) -> None:
        """Check the layers."""
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

    @property
    def max_draft_tokens(self) -> int:
        """The most tokens of a draft."""
        return self.length.maximum

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """Draft token by token, until the rule for the draft's length ends it."""
        starts = batch.lengths

        def step(last: list[int], number: int) -> tuple[Tensor, None]:
            positions = batch.positions([start + number for start in starts], 1)
            x = batch.embed([[token] for token in last])
            x = self.decoder.forward_layers(x, positions, batch.cache, self.kept)
            return self.decoder.head(x)[:, -1], None

        return draft_loop(batch, self.length, limits, step)


def default_skipped_layers(depth: int) -> tuple[int, ...]:
    """Return every second layer of the middle half, the default where no search was made."""
    outer = max(1, depth // 4)
    return tuple(range(outer, depth - outer, 2))
