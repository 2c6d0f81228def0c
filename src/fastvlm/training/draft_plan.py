"""What a draft is and how it is trained: the settings of Python and of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastvlm.functional.options import Option


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """An imitation network to train, and its loss.

    Args:
        kind: `block` (decoder layers of the target's kind, with a cache of their own) or `mlp`
            (the gated feed-forward network of arXiv 2510.22641).
        exit_layer: Layers of the target that run before the network (k).
        blocks: Decoder layers of a `block`; of a network that goes on, the fewest.
        draft_vocabulary: The most tokens that can be drafted: the most frequent of the replies; 0
            for all.
        random_start: Whether the network starts at random, and not as the layers of the target
            that it stands for.
        cosine: Weight of 1 - cos between the network's normed states and the last layer's.
        cross_entropy: Weight of the cross-entropy against the target's best token.
    """

    kind: str = "block"
    exit_layer: int = 1
    blocks: Annotated[
        int,
        Option(
            "Decoder layers of a block. A network that goes on keeps those that it has, and further"
            " ones add nothing at first.",
            "N",
            1,
            64,
        ),
    ] = 1
    draft_vocabulary: Annotated[
        int,
        Option(
            "The most tokens that can be drafted, the replies' most frequent; 0: all.",
            "N",
            0,
            2**31 - 1,
        ),
    ] = 1024
    random_start: Annotated[
        bool,
        Option(
            "Start at random, not as the layers that the network stands for.",
            flag="--random-start",
        ),
    ] = False
    cosine: Annotated[float, Option("Weight of 1 - cos in the loss.", "X", 0, 1e6)] = 0.1
    cross_entropy: Annotated[
        float, Option("Weight of the cross-entropy in the loss.", "X", 0, 1e6)
    ] = 0.1
