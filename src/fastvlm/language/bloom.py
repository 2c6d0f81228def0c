"""BLOOM: no positions but a slope for each head, by which scores grow with the key's position."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvlm.language.general import GeneralDecoder
from fastvlm.language.positions import Positions


class BloomDecoder(GeneralDecoder):
    """The decoder of BLOOM. See `GeneralDecoder`."""

    PARTS: ClassVar = ("embed_tokens", "word_embeddings_layernorm", "layers", "norm")
    EXTRAS: ClassVar = ("alibi",)

    @staticmethod
    def positions_of(config: Any) -> int:  # noqa: ARG004 (as the base class has it)
        """Return the positions that a model was made for, to which slopes set no end."""
        return sys.maxsize

    def enter(self, x: Tensor, positions: Positions) -> Tensor:  # noqa: ARG002
        """Return embeddings, normed: (batch, new, d_model)."""
        return self.decoder.word_embeddings_layernorm(x)

    def first_entry(self) -> Callable[[Tensor], Tensor]:
        """Return what `enter` does to the first positions."""
        return self.decoder.word_embeddings_layernorm

    def extras(self, x: Tensor, positions: Positions) -> dict[str, Any]:
        """Return the bias of each key. See `GeneralDecoder.extras`."""
        keys = torch.ones(len(x), positions.end, dtype=torch.long, device=x.device)
        return {"alibi": self.decoder.build_alibi_tensor(keys, self.decoder.num_heads, x.dtype)}
