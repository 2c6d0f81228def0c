"""Which drafted tokens are accepted, and what follows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accept_greedy(drafted: Sequence[int], best: Sequence[int]) -> tuple[int, int]:
    """Accept a draft against the target's own choices (greedy decoding).

    Args:
        drafted: The draft, g tokens.
        best: argmax p_0 .. argmax p_g: the target's choice after the last committed token and
            after each drafted one.

    Returns:
        How many drafted tokens are accepted, and the token that follows them: the target's own at
        the first disagreement, or the bonus token.
    """
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == best[accepted]:
        accepted += 1
    return accepted, best[accepted]


def draw(weights: Tensor, generator: torch.Generator | None = None) -> int:
    """Draw an index in proportion to weights that need not sum to one: (vocabulary,)."""
    return int(torch.multinomial(weights, 1, generator=generator))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Return the weights to draw from where a drafted token is rejected: max(p - q, 0).

    (Leviathan et al. 2023, section 2.3; Chen et al. 2023, theorem 1.) Where rounding leaves nothing
    of them, p itself: p and q are then equal, and rejecting had a probability of nought.
    """
    left = (p - q).clamp(min=0)
    return left if bool(left.any()) else p


def accept_or_replace(
    token: int, p: Tensor, q: Tensor | None, generator: torch.Generator | None = None
) -> int | None:
    """Accept a drafted token so that what comes out is distributed as p, whatever q is.

    Args:
        token: The drafted token.
        p: The target's distribution at its position: (vocabulary,).
        q: The distribution that it was drawn from: (vocabulary,); None for a token that was not
            drawn, which is a draw from a q of one at the token.
        generator: What random numbers are drawn from.

    Returns:
        None if it is accepted, with probability min(1, p / q); else the token that replaces it.
    """
    if q is None:
        q = torch.zeros_like(p)
        q[token] = 1
    chance = torch.rand((), generator=generator, device=p.device, dtype=p.dtype)
    if bool(chance * q[token] < p[token]):
        return None
    return draw(residual(p, q), generator)
