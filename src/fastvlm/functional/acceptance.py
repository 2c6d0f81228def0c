"""Which drafted tokens are accepted, and what follows them."""

from __future__ import annotations

from collections.abc import Sequence


def accept(drafted: Sequence[int], chosen: Sequence[int]) -> tuple[int, int]:
    """Accept the longest prefix of a draft that the target chooses itself.

    The target's choice at each position is x_i = argmax(log p_i + G_i), with G = 0 for greedy
    decoding and Gumbel noise for sampling, whatever was drafted. So a reply's tokens are the
    target's own, and t_i = x_i only says how many of them one pass gave.

    Args:
        drafted: The draft, t_1 .. t_g.
        chosen: The target's choices after the last committed token and after each drafted one: as
            many as there are up to the first that differs, at least.

    Returns:
        How many drafted tokens are accepted, and the token that follows them.
    """
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == chosen[accepted]:
        accepted += 1
    return accepted, chosen[accepted]
