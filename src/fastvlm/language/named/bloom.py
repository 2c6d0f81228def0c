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
        away = positions.distances
        places = positions.indices[: len(away), :, None] - away
        two = torch.ones(1, 2, dtype=torch.long, device=x.device)
        heads = self.decoder.num_heads
        slopes = self.decoder.build_alibi_tensor(two, heads, torch.float32)[:, 0, 1]
        bias = (slopes[:, None, None] * places[:, None]).expand(len(x), -1, -1, -1)
        return {"alibi": bias.reshape(len(x) * heads, *places.shape[1:]).to(x.dtype)}
