"""Digests of training examples and data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvlm.data.conversations import Records, Shards
from fastvlm.functional.digests import digest
from fastvlm.training.replies import Example


def digest_of_examples(examples: Sequence[Example]) -> str:
    """Return a digest of examples: their texts, images and replies."""
    return digest([[example.messages, example.reply] for example in examples])


def digest_of_source(source: Records | Shards) -> str:
    """Return a digest of a data set.

    It covers the contents of its rows, without the contents of image files that they name; for
    shards, their names and sizes.
    """
    if isinstance(source, Records):
        # What Hugging Face's datasets tell their own tables by.
        known = getattr(source.rows, "_fingerprint", None)
        if known:
            return digest([str(known), len(source)])
        if all(isinstance(row, Mapping) for row in source.rows):
            return digest(list(source.rows))
        # Rows that only say where a record is.
        return digest([[one.name, getattr(one, "messages", None)] for one in source])
    files = [Path(str(file)) for file in getattr(source, "files", ())]
    return digest([type(source).__name__, len(source), files])
