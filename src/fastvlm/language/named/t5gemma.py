"""T5Gemma: of the usual form, with cross-attention, but its decoder has no class of its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaDecoder as Decoder

from fastvlm.language.general import GeneralDecoder
from fastvlm.language.untrained import untrained_layers


class T5GemmaDecoder(GeneralDecoder):
    """The decoder of T5Gemma. See `GeneralDecoder`."""

    @staticmethod
    def blocks(config: Any, number: int, first_index: int) -> nn.ModuleList:
        """Return untrained layers of the family, which cache as layers from `first_index` on."""
        return untrained_layers(config, number, first_index, kind=Decoder)
