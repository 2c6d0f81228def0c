"""What a draft step runs, as a decoder is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from fastvlm.language.cache import KeyValueCache
from fastvlm.language.positions import Positions


class DraftPath(NamedTuple):
    """What a draft step runs.

    Args:
        exit_layer: Layers of the target (k).
        blocks: Layers of the target's kind that stand for the others.
        mlp: What makes the last layer's states of the exit layer's instead; None for nothing.
        rows: The LM head's rows of the tokens that can be drafted, see `lm_head_rows`; None for all
            of the head.
        tokens: The tokens that can be drafted: (tokens,); None for all.
    """

    exit_layer: int
    blocks: Sequence[nn.Module]
    mlp: nn.Module | None
    rows: Tensor | None
    tokens: Tensor | None = None


class Draws(NamedTuple):
    """How draft steps draw their tokens.

    Args:
        temperatures: By which each row's logits are divided: (batch,).
        noise: What is added to them then in each step: (steps, batch, tokens).
    """

    temperatures: Tensor
    noise: Tensor


class DraftsAhead(Protocol):
    """What runs several draft steps of a decoder in one call."""

    @property
    def prepared(self) -> int:
        """How often a call has prepared others like it. See `SplitDecoder.prepared`."""
        ...

    def follow(self) -> None:
        """Take over what has changed about the model. See `SplitDecoder.follow`."""
        ...

    def least(self, path: DraftPath, drafted: int) -> int:
        """Return how many steps are worth a call where fewer are usual.

        Args:
            path: What each step runs.
            drafted: Steps of the draft that were run already.
        """
        ...

    def draft_ahead(
        self,
        tokens: Sequence[int],
        positions: Positions,
        cache: KeyValueCache,
        path: DraftPath,
        behind: Tensor | None = None,
        draws: Draws | None = None,
    ) -> list[tuple[list[int], list[float]]] | None:
        """Run several draft steps in one call, each with the tokens of the one before.

        Args:
            tokens: What stands at each row's first position.
            positions: Those of `behind`, and then one for each step.
            cache: Where layers keep their keys and values.
            path: What each step runs.
            behind: Of a row alone, the exit layer's states of positions before the first, which
                blocks are to see too: (1, positions, d_model).
            draws: How each row draws its tokens; None for the best ones.

        Returns:
            Each step's tokens and their probabilities, by rows; None where steps are run one by
            one.
        """
        ...
