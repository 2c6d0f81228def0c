"""What a draft step runs, as a decoder is told."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

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


@runtime_checkable
class DraftsAhead(Protocol):
    """A decoder that can run several draft steps in one call."""

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


def drafts_ahead(decoder: object) -> TypeGuard[DraftsAhead]:
    """Return whether a decoder can run several draft steps in one call."""
    kind: Any = type(decoder)
    return _drafts_ahead(kind)


@cache
def _drafts_ahead(kind: Any) -> bool:
    # Looking methods up anew takes a hundredth of a small model's step.
    return issubclass(kind, DraftsAhead)
