"""Cached image features, for later prompts about the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastvlm.functional.lru import LruBytes
from fastvlm.functional.overrides import override_method

Features = Tensor | Sequence[Tensor]
"""Images' visual tokens, (visual tokens, d_model), in one tensor or in one for each image."""
COMMON_FIELDS = frozenset(one.name for one in fields(BaseModelOutputWithPooling))
"""What every `get_image_features` may return; of these the features alone are read."""


class ImageFeatureCache:
    """Keeps a model's image features by digest. It may be used from any thread.

    Args:
        lru: Where they are kept; it may be shared with other caches.
    """

    def __init__(self, lru: LruBytes) -> None:
        self.lru = lru

    def get(self, digest: str) -> Features | None:
        """Return the features of a digest; None if they are not kept."""
        found = self._get(digest)
        return None if found is None else found.features

    def put(self, digest: str, features: Features) -> bool:
        """Keep an image's features; return whether there is room for them.

        Args:
            digest: A digest of the image and of everything else that its features depend on.
            features: The visual tokens, which must not be changed later.
        """
        return self._put(digest, _Kept(features))

    @contextmanager
    def patched(self, model: PreTrainedModel) -> Iterator[list[str]]:
        """Answer a model's `get_image_features` from this cache, in this thread and context.

        Args:
            model: The model; one without `get_image_features` is left alone.

        Yields:
            The digests of the calls so far. They depend on all arguments, the question that
            InstructBLIP's Q-Former reads included.
        """
        asked: list[str] = []
        # Where both have the method, the outer model's asks the inner one's.
        owner: Any = model.base_model
        if not hasattr(owner, "get_image_features"):
            owner = model
        if not hasattr(owner, "get_image_features"):
            yield asked
            return

        def answer(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            name = digest([*args, *sorted(kwargs.items())])
            asked.append(name)
            found = self._get(name)
            if found is not None:
                return found.output()
            output = original(*args, **kwargs)
            # Such as DeepStack's features for several layers, which Granite 4 has alone.
            others = {
                key: value
                for key, value in vars(output).items()
                if key not in COMMON_FIELDS and value is not None
            }
            if output.pooler_output is None and not others:
                # Llama 4's features are what leaves its tower.
                others["last_hidden_state"] = output.last_hidden_state
            self._put(name, _Kept(output.pooler_output, type(output), others))
            return output

        with override_method(owner, "get_image_features", answer):
            yield asked

    def _put(self, digest: str, kept: _Kept) -> bool:
        nbytes = sum(tensor.nbytes for tensor in tensors_in([kept.features, *kept.others.values()]))
        return self.lru.put(_Key(self, digest), kept, nbytes)

    def _get(self, digest: str) -> _Kept | None:
        found: _Kept | None = self.lru.get(_Key(self, digest))
        return found


@dataclass(frozen=True, slots=True)
class _Key:
    """The key of an image's features, which can't be that of anything else in the same cache."""

    cache: ImageFeatureCache
    digest: str


@dataclass(frozen=True, slots=True)
class _Kept:
    """An image's features, and the class of what the model returned with them.

    Args:
        features: The visual tokens; None where a family returns them otherwise.
        output_type: The class of `get_image_features`' output.
        others: What the family adds, by its names.
    """

    features: Features | None
    output_type: Any = BaseModelOutputWithPooling
    others: Mapping[str, Any] = field(default_factory=dict)

    def output(self) -> Any:
        """Return the features as the model did, without states of its tower."""
        output = self.output_type()
        # Some models add the features to a class that has no field for them.
        output.pooler_output = self.features
        for name, value in self.others.items():
            setattr(output, name, value)
        return output


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a value: a tensor, sequences of them, and plain values."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def digest(value: Any) -> str:
    """Return a digest of a value: tensors, sequences of them, and plain values."""
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
