"""Pictures' features, kept for the next prompt about the same pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.language.prefix import PrefixStore


class FeatureMemory:
    """Answers a model's `get_image_features` from a store, where the answer is known.

    Args:
        model: The model; one without pictures is never asked.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Where both have the method, the outer model's asks the inner one's.
        self.owner: Any = model.base_model
        self.kind: Any = None
        """The class of what the model itself answers."""

    @contextmanager
    def answering(self, store: PrefixStore | None) -> Iterator[list[str]]:
        """Answer while the context lasts, which leaves the model as it was.

        Args:
            store: Where features are found and kept; None for nowhere.

        Yields:
            The digests of what has been asked: they differ where any input does, the question that
            InstructBLIP's Q-Former reads included.
        """
        asked: list[str] = []
        if store is None or not hasattr(self.owner, "get_image_features"):
            yield asked
            return
        compute = self.owner.get_image_features

        def answer(*given: Any, **named: Any) -> Any:
            name = digest([*given, *sorted(named.items())])
            asked.append(name)
            found = store.features(name)
            if found is not None:
                return self.kind(pooler_output=found)
            output = compute(*given, **named)
            self.kind = type(output)
            store.keep_features(name, output.pooler_output)
            return output

        # An attribute of the object hides its class's method until it is deleted.
        self.owner.get_image_features = answer
        try:
            yield asked
        finally:
            del self.owner.get_image_features


def digest(value: Any) -> str:
    """Return what tells a value from others: tensors, in sequences or alone, and plain values."""
    found = hashlib.blake2b(digest_size=16)
    if isinstance(value, Tensor):
        found.update(repr((value.shape, value.dtype)).encode())
        bare = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(bare.numpy().data)
    elif isinstance(value, list | tuple):
        found.update(" ".join(["several", *map(digest, value)]).encode())
    else:
        found.update(repr(value).encode())
    return found.hexdigest()
