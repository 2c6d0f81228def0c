"""Descriptions of several sentences that say different things of a photo.

People's captions of one photo say nearly the same, one after another: a model that learns them in
a row repeats itself, and greedy decoding then says one sentence over and over.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from fastvlm.data.captioned import words_of

COMMON = words_of(
    "a an the and or but of in on at to from with by for into onto over under up down out off near"
    " next his her its their he she it they him them who which that this these those there is are"
    " was were be being been has have having as while some one two three another other"
)
"""Words that say nothing of what a photo shows."""
NEARLY_ALL = 0.8
"""From this share on, a sentence counts as a near repetition of another."""
MOST_SHARED = (0.7, 0.5)
"""The largest share of the shorter sentence's words that the second sentence of a description, and
the third, may have in common with one before: two that are a little alike are better than one."""


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]


def telling(sentence: str) -> set[str]:
    """Return the stems of a sentence's words that tell something, endings cut off."""
    stems = (re.sub(r"(?:ing|ed|es|e|s)$", "", word) for word in words_of(sentence) - COMMON)
    # "running" is "run".
    return {re.sub(r"([b-df-hj-np-tv-z])\1$", r"\1", stem) for stem in stems}


def shared(one: str, other: str) -> float:
    """Return the share of the shorter sentence's telling words that the other says too."""
    first, second = telling(one), telling(other)
    return len(first & second) / max(1, min(len(first), len(second)))


def nearly_repeated(sentences: Sequence[str]) -> bool:
    """Return whether a sentence says little but what one before it said."""
    return any(
        shared(sentence, before) > NEARLY_ALL
        for place, sentence in enumerate(sentences)
        for before in sentences[:place]
    )


def described_by(captions: Sequence[str]) -> str:
    """Return a description of a photo: some of its captions, each of which says something else.

    Args:
        captions: The photo's captions, the most typical first; one of the first three begins.
    """
    said = [random.choice(captions[:3])]
    for most in MOST_SHARED:
        left = [
            (max(shared(caption, one) for one in said), caption)
            for caption in captions
            if caption not in said
        ]
        share, caption = min(left, default=(1.0, ""))
        if share > most:
            break
        said.append(caption)
    return " ".join(said)
