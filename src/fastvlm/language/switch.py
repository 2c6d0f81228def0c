"""Where `generate` empties its cache amid a reply, as Phi's families do, and what it does then."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Switch:
    """What `generate` of a model does where a row's length passes one that its configuration names.

    Args:
        length: The length.
        loses_prompt: Whether the model is handed the last token alone from there on, for want of
            a cache that knows those before it; else it is handed all tokens anew.
    """

    length: int
    loses_prompt: bool

    @property
    def ending(self) -> str:
        """Where replies end, to end a sentence with."""
        return f"at {self.length} positions, beyond which transformers' generate loses the prompt"


def switch_of(model: PreTrainedModel) -> Switch | None:
    """Return where `generate` of a model empties its cache; None for nowhere.

    The model's own preparation of a step is asked, as releases of `transformers` differ.
    """
    length: int | None = getattr(model.config, "original_max_position_embeddings", None)
    prepare: Any = getattr(model, "prepare_inputs_for_generation", None)
    if length is None or prepare is None:
        return None
    cache = FilledCache(length)
    name = "cache" if "cache" in inspect.signature(prepare).parameters else "past_key_values"
    ids = torch.zeros((1, length + 1), dtype=torch.long)
    given = prepare(
        ids,
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        next_sequence_length=1,
        **{name: cache},
    )
    if given.get(name) is cache:
        return None
    return Switch(length, loses_prompt=given["input_ids"].shape[1] == 1)


class FilledCache(DynamicCache):
    """A cache that says that it has some positions, and is true as one with layers is."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __len__(self) -> int:
        """Return the number of layers: more than none."""
        return 1

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (the cache's own signature)
        """Return the number of positions."""
        return self.length
