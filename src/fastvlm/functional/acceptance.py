"""Which drafted tokens are accepted, and what follows them."""

from __future__ import annotations

from collections.abc import Sequence


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
