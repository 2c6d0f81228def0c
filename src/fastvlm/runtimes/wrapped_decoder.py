"""A split decoder around another: what it doesn't compute itself, the other does, in torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from fastvlm.functional.errors import InputError
from fastvlm.language.cache import KeyValueCache
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.general import GeneralDecoder
from fastvlm.language.positions import Positions


class WrappedDecoder(SplitDecoder):
    """A decoder of the usual form that another runtime computes, as far as that knows how.

    Args:
        split: The decoder in torch, which embeds, makes tables of rotations and knows the family.

    Raises:
        InputError: The decoder is of another form.
    """

    title: ClassVar[str]
    """What the runtime is called in a sentence."""
    shape = staticmethod(GeneralDecoder.shape)
    blocks = staticmethod(GeneralDecoder.blocks)
    feed_forward = staticmethod(GeneralDecoder.feed_forward)

    def __init__(self, split: SplitDecoder) -> None:
        super().__init__(split.model, split.decoder)
        self.name = type(split.model).__name__
        if not isinstance(split, GeneralDecoder) or split.EXTRAS:
            raise self.refusal("its decoder is not of the usual form")
        self.split = split
        self.width, self.context = split.width, split.context
        self.max_positions, self.restart = split.max_positions, split.restart

    def room(self, length: int) -> int | None:
        """Return how many tokens a reply may have. See `SplitDecoder.room`."""
        return self.split.room(length)

    @property
    def ending(self) -> str:
        """Where a reply without room ends. See `SplitDecoder.ending`."""
        return self.split.ending

    def position_keys(self, keys: Sequence[Hashable], prompt_length: int) -> Sequence[Hashable]:
        """Return what tells states of positions from others. See `SplitDecoder.position_keys`."""
        return self.split.position_keys(keys, prompt_length)

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of hidden states, by torch."""
        return self.split.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the LM head's outputs scaled and soft-capped, as the model does it."""
        return self.split.logits(x)

    def forward_layers(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Iterable[int]
    ) -> Tensor:
        """Run some of the target's layers. See `SplitDecoder.forward_layers`."""
        return self.split.forward_layers(x, positions, cache, layers)

    def forward_blocks(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        blocks: Iterable[nn.Module],
        exit_layer: int,
    ) -> Tensor:
        """Run layers of the target's own kind. See `SplitDecoder.forward_blocks`."""
        return self.split.forward_blocks(x, positions, cache, blocks, exit_layer)

    def refusal(self, reason: str) -> InputError:
        """Return the error that says why this model is not decoded here."""
        return InputError(
            f"{self.title} can't decode {self.name}: {reason}. Load it with runtime='torch'."
        )
