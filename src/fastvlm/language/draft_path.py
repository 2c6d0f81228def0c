"""What a draft step runs, as a decoder is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

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
        temperature: By which logits are divided.
        noise: What is added to each step's logits then: (steps, tokens).
    """

    temperature: float
    noise: Tensor


@runtime_checkable
class DraftsAhead(Protocol):
    """A decoder that can run several draft steps of a row in one call."""

    def draft_ahead(
        self,
        token: int,
        positions: Positions,
        cache: KeyValueCache,
        path: DraftPath,
        draws: Draws | None = None,
    ) -> list[tuple[int, float]] | None:
        """Run several draft steps of one row in one call, from a token on.

        Args:
            token: What stands at the first position.
            positions: One for each step.
            cache: Where layers keep their keys and values.
            path: What each step runs.
            draws: How each draws its token; None for its best one.

        Returns:
            Each step's token and its probability; None where these are run one by one.
        """
        ...
