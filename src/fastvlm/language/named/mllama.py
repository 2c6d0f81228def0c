"""Llama 3.2 Vision (Mllama): layers of their own attend to the image, between those of the text."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm.language.cross_attention import CrossCache
from fastvlm.language.decoder import cache_name
from fastvlm.language.general import GeneralDecoder, LayerRun
from fastvlm.language.masks import additive
from fastvlm.language.positions import EncoderContext, Positions


class _SourceCache(CrossCache):
    """A cache whose length is that of the source, which layers of transformers 5.17 ask for."""

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the positions of the source, once a layer has seen them."""
        return max((known.keys.shape[2] for known in self.layers.values()), default=0)


class MllamaDecoder(GeneralDecoder):
    """The decoder of Mllama. See `GeneralDecoder`.

    Cross-attention layers are left out of rows without an image, as the model does.
    """

    def _run(self, x: Tensor, run: LayerRun) -> Tensor:
        source = run.positions.encoder
        for crosses, some in groupby(run.layers, key=lambda one: hasattr(one[0], "cross_attn")):
            if not crosses:
                x = super()._run(x, run._replace(layers=list(some)))
            elif source is not None:
                for layer, *_ in some:
                    x = self._cross(layer, x, run, source)
        return x

    def _cross(self, layer: Any, x: Tensor, run: LayerRun, source: EncoderContext) -> Tensor:
        both: Any = _SourceCache(run.cache, source)
        seen = self._seen(run.positions, source)
        any_seen = seen.any(-1, keepdim=True)
        # A position that sees nothing attends to all of its row's source, as the model has it.
        attended = (seen | ~any_seen) & source.visible[:, None, None]
        found = layer(
            x,
            cross_attention_states=None if layer.layer_idx in both.layers else source.states,
            cross_attention_mask=additive(attended, x.dtype),
            attention_mask=None,
            full_text_row_masked_out_mask=any_seen.to(x.dtype),
            **{cache_name(layer): both},
        )
        has_source = source.visible.any(1)[:, None, None]
        return torch.where(has_source, found, x)

    def _seen(self, positions: Positions, source: EncoderContext) -> Tensor:
        """Return what positions see of their row's source: (batch, 1, width, source)."""
        rows = []
        for prompt, start in zip(positions.prompts, positions.starts, strict=True):
            size = source.states.shape[1]
            own = None if prompt is None else prompt.source_visible
            if own is None:
                rows.append(
                    torch.ones(positions.width, size, dtype=torch.bool, device=source.states.device)
                )
                continue
            # A reply sees what the prompt's last position does.
            places = torch.arange(start, start + positions.width, device=own.device)
            shown = own[places.clamp(max=len(own) - 1)]
            rows.append(F.pad(shown, (0, size - shown.shape[1])))
        return torch.stack(rows)[:, None]
