"""Decoders of the usual form, of any family: embedding, layers that rotate by position, norm.

How its layers are called is observed (`layer_calls`), and what comes out is held against the model
itself (`verification`), so no family needs to be named here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.language.cache import KeyValueCache
from fastvlm.language.decoder import DecoderShape, FeedForward, SplitDecoder, untrained_layers
from fastvlm.language.layer_calls import (
    CACHE_NAMES,
    DecoderCalls,
    LayerCall,
    RotaryKind,
    observe_calls,
)
from fastvlm.language.masks import MaskKind
from fastvlm.language.positions import Positions
from fastvlm.language.rotary import Rotary, Rotations, scaled_context
from fastvlm.language.verification import verified_rule

FEED_FORWARD_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")
"""What families call the norm before a layer's feed-forward part, the more particular first."""


class GeneralDecoder(SplitDecoder):
    """A decoder of the usual form.

    Args:
        model: The model that the decoder is part of.
        decoder: A module with `embed_tokens`, `layers` and `norm`, and mostly `rotary_emb`.

    Raises:
        InputError: It is of another form, calls its layers in a way that isn't known, or gives
            other states than the model's own `forward`.
    """

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        super().__init__(model, decoder)
        self.width = decoder.config.hidden_size
        self.context = scaled_context(decoder.config)
        self.calls: DecoderCalls = observe_calls(decoder)
        kinds = {call.rotary for call in self.calls.layers if call.rotary is not None}
        self.rotary: dict[RotaryKind, Rotary] = {
            kind: Rotary(getattr(decoder, kind.module), kind.layer_type, axes=kind.axes)
            for kind in kinds
        }
        self.logit_rule = verified_rule(self)

    @staticmethod
    def shape(config: Any) -> DecoderShape:
        """Return the shape of the decoder of a configuration."""
        names = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")
        eps = next((getattr(config, name) for name in names if hasattr(config, name)), 1e-6)
        hidden: Any = config.intermediate_size
        return DecoderShape(
            config.num_hidden_layers,
            config.hidden_size,
            hidden[-1] if isinstance(hidden, list | tuple) else hidden,
            eps,
        )

    @staticmethod
    def blocks(config: Any, number: int, first_index: int) -> nn.ModuleList:
        """Return untrained layers of the family, which cache as layers from `first_index` on.

        They are of the kinds of the target's last layers.
        """
        return untrained_layers(config, number, first_index)

    @staticmethod
    @torch.no_grad()
    def feed_forward(layer: Any) -> FeedForward | None:
        """Return a layer's gated feed-forward part; None where it has none, or more than one."""
        part: Any = getattr(layer, "mlp", None)
        norm = next(
            (found for name in FEED_FORWARD_NORMS if (found := getattr(layer, name, None))), None
        )
        if norm is None or getattr(getattr(part, "down_proj", None), "weight", None) is None:
            return None
        if hasattr(part, "gate_up_proj"):
            gate, up = part.gate_up_proj.weight.chunk(2)
        elif hasattr(part, "gate_proj"):
            gate, up = part.gate_proj.weight, part.up_proj.weight
        else:
            return None
        if gate.dim() != 2 or gate.shape[::-1] != part.down_proj.weight.shape:  # noqa: PLR2004
            return None
        # Some families' norms multiply by 1 + weight: what ones become is what counts.
        ones = torch.ones(1, gate.shape[1], device=gate.device, dtype=gate.dtype)
        return FeedForward(norm(ones)[0], gate, up, part.down_proj.weight)

    def forward_layers(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Iterable[int]
    ) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states."""
        # Going through a list of modules is faster than looking each up by its number.
        own, calls, numbers = tuple(self.layers), self.calls.layers, list(layers)
        if numbers and numbers[0] == 0:
            x = self._enter(x)
            if (added := positions.injection(-1, x)) is not None:
                x = x + added
        return self._run(
            x, positions, cache, [(own[index], calls[index], index) for index in numbers]
        )

    def forward_blocks(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, blocks: Iterable[nn.Module]
    ) -> Tensor:
        """Run layers of the target's own kind that are not the target's."""
        own = list(blocks)
        calls = self.calls.layers[-len(own) :]
        return self._run(
            x,
            positions,
            cache,
            [(block, call, None) for block, call in zip(own, calls, strict=True)],
        )

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of hidden states."""
        return self.decoder.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the LM head's outputs scaled and soft-capped, as the model does it."""
        return self.logit_rule(x)

    def position_keys(self, keys: Sequence[Hashable], prompt_length: int) -> Sequence[Hashable]:
        """Return what tells states of positions from others. See `SplitDecoder.position_keys`."""
        scaled = [rotary for rotary in self.rotary.values() if not rotary.is_static]
        if not scaled:
            return keys
        return [
            (*(rotary.regime(place, prompt_length) for rotary in scaled), key)
            for place, key in enumerate(keys)
        ]

    def _enter(self, x: Tensor) -> Tensor:
        """Return embeddings as the first layer takes them."""
        if self.calls.entry == "scale":
            return x * self.decoder.embedding_multiplier
        return self.decoder.norm(x) if self.calls.entry == "norm" else x

    def _run(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        layers: Sequence[tuple[Any, LayerCall, int | None]],
    ) -> Tensor:
        """Run layers, each with how it is called and its number in the target, if it has one."""
        cache.begin_pass(positions)
        masks: dict[MaskKind, Tensor | None] = {}
        rotations: dict[RotaryKind | None, Rotations | None] = {None: None}
        arguments: dict[LayerCall, dict[str, Any]] = {}
        for layer, call, number in layers:
            given = arguments.get(call)
            if given is None:
                if call.mask not in masks:
                    masks[call.mask] = self.mask(x, positions, call.mask)
                if call.rotary is not None and call.rotary not in rotations:
                    rotations[call.rotary] = self.rotary[call.rotary](x, positions)
                known: dict[str, Any] = {
                    "attention_mask": masks[call.mask],
                    "position_ids": positions.indices,
                    "position_embeddings": rotations[call.rotary],
                    "use_cache": True,
                    **dict.fromkeys(CACHE_NAMES, cache),
                }
                given = arguments[call] = {name: known[name] for name in call.names}
            x = layer(x, **given)
            if isinstance(x, tuple):
                x = x[0]
            if number is not None and (added := positions.injection(number, x)) is not None:
                x = x + added
        return x
