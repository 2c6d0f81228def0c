"""Decoders of the usual form, of any family: embedding, layers that rotate by position, norm.

How its layers are called is observed (`layer_calls`), and what comes out is held against the model
itself (`verification`), so no family needs to be named here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from itertools import count, groupby
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language.cache import KeyValueCache
from fastvlm.language.cross_attention import CrossCache
from fastvlm.language.decoder import (
    DecoderShape,
    FeedForward,
    SplitDecoder,
)
from fastvlm.language.dense import dense_weight
from fastvlm.language.fused import LayerInputs, kind_of, layer_inputs, run_layer
from fastvlm.language.layer_calls import (
    CACHE_NAMES,
    DecoderCalls,
    LayerCall,
    RotaryKind,
    observe_calls,
    root_of_width,
)
from fastvlm.language.masks import additive
from fastvlm.language.positions import EncoderContext, Positions
from fastvlm.language.rotary import Rotary, is_longrope, scaled_context
from fastvlm.language.structure import check_structure
from fastvlm.language.switch import switch_of
from fastvlm.language.untrained import untrained_layers
from fastvlm.language.verification import verified_rule

FEED_FORWARD_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")
"""What families call the norm before a layer's feed-forward part, the more particular first."""


CalledLayer = tuple[Any, LayerCall, tuple[int, ...]]
"""A layer, how it is called, and the target's layers whose additions to the states follow it."""


class LayerRun(NamedTuple):
    """Layers that hidden states go through, one after another.

    Args:
        positions: Of the pass.
        cache: Where the layers keep their keys and values.
        layers: The layers.
    """

    positions: Positions
    cache: KeyValueCache
    layers: Sequence[CalledLayer]


class GeneralDecoder(SplitDecoder):
    """A decoder of the usual form.

    Args:
        model: The model that the decoder is part of.
        decoder: A module with `embed_tokens`, `layers` and `norm`, and mostly `rotary_emb`.

    Raises:
        InputError: It is of another form, calls its layers in a way that isn't known, or gives
            other states than the model's own `forward`.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("embed_tokens", "layers", "norm")
    """The modules that such a decoder has, by what Llama calls them; see `structure.NAMES`."""
    EXTRAS: ClassVar[tuple[str, ...]] = ()
    """Arguments of its layers beside the usual ones; `extras` has what they are."""

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        super().__init__(model, decoder)
        check_structure(decoder, self.PARTS)
        self.width, self.context = self.sizes(decoder)
        self.switch = switch_of(model)
        if self.switch is not None and not self.switch.loses_prompt and is_longrope(decoder.config):
            self.restart = self.switch.length
        self.calls: DecoderCalls = observe_calls(decoder, self.first_entry(), self.EXTRAS)
        kinds = {call.rotary for call in self.calls.layers if call.rotary is not None}
        self.rotary: dict[RotaryKind, Rotary] = {
            kind: Rotary(decoder.get_submodule(kind.module), kind.layer_type, axes=kind.axes)
            for kind in kinds
        }
        self.logit_rule = verified_rule(self)

    def room(self, length: int) -> int | None:
        """Return how many tokens a reply may have. See `SplitDecoder.room`."""
        if self.switch is None or not self.switch.loses_prompt or length > self.switch.length:
            return super().room(length)
        # The last one is never computed with.
        return self.switch.length + 1 - length

    @property
    def ending(self) -> str:
        """Where a reply without room ends. See `SplitDecoder.ending`."""
        switch = self.switch
        return switch.ending if switch is not None and switch.loses_prompt else super().ending

    @classmethod
    def sizes(cls, decoder: Any) -> tuple[int, int]:
        """Return the width of a decoder's states, and the positions that it was made for.

        Raises:
            InputError: Its configuration doesn't say them under the usual names.
        """
        try:
            return decoder.config.hidden_size, cls.positions_of(decoder.config)
        except AttributeError as error:
            raise InputError(
                f"fastvlm can't split a {type(decoder).__name__}: {error}. Decode it with"
                " transformers' own generate."
            ) from error

    @staticmethod
    def positions_of(config: Any) -> int:
        """Return the positions that a model of a configuration was made for."""
        return scaled_context(config)

    @staticmethod
    def shape(config: Any) -> DecoderShape:
        """Return the shape of the decoder of a configuration."""
        names = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")
        eps = next((getattr(config, name) for name in names if hasattr(config, name)), 1e-6)
        hidden: Any = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
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
        first = getattr(part, "gate_up_proj", getattr(part, "gate_proj", None))
        width, down = getattr(first, "in_features", None), getattr(part, "down_proj", None)
        if norm is None or width is None or getattr(down, "out_features", None) != width:
            return None
        like = next(one for one in layer.parameters() if one.is_floating_point())
        if hasattr(part, "gate_up_proj"):
            gate, up = dense_weight(first, width, like).chunk(2)
        else:
            gate, up = (dense_weight(one, width, like) for one in (first, part.up_proj))
        # Some families' norms multiply by 1 + weight: what ones become is what counts.
        scale = norm(torch.ones(1, width, device=gate.device, dtype=gate.dtype))[0]
        return FeedForward(scale, gate, up, dense_weight(down, len(gate), like))

    def forward_layers(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Iterable[int]
    ) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states."""
        # Going through a list of modules is faster than looking each up by its number.
        own = list(zip(self.layers, self.calls.layers, zip(count()), strict=False))
        chosen = [own[index] for index in layers]
        if chosen and chosen[0][2] == (0,):
            x = self.enter(x, positions)
        return self._run(x, LayerRun(positions, cache, chosen))

    def forward_blocks(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        blocks: Iterable[nn.Module],
        exit_layer: int,
    ) -> Tensor:
        """Run layers of the target's own kind that stand for those from the exit layer on.

        What the target adds to its states from there on, they are given too: each block what is
        added within the layers that it stands for, before it.
        """
        own = list(blocks)
        first, *after = added_after(exit_layer, self.depth, len(own))
        if positions.injects:
            for number in first:
                x = injected(x, positions, number)
        called = zip(own, self.calls.layers[-len(own) :], after, strict=True)
        return self._run(x, LayerRun(positions, cache, list(called)))

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of hidden states."""
        norm: Callable[[Tensor], Tensor] = getattr(self.decoder, self.part_names["norm"])
        return norm(x)

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

    def enter(self, x: Tensor, positions: Positions) -> Tensor:  # noqa: ARG002 (for tables)
        """Return embeddings as the first layer takes them: (batch, new, d_model).

        A family that does more than scaling or norming overrides this and `first_entry`.
        """
        entry = self.calls.entry
        if entry == "nothing":
            return x
        if entry == "scale":
            return x * self.decoder.embedding_multiplier
        return x * root_of_width(x) if entry == "root" else self.norm(x)

    def first_entry(self) -> Callable[[Tensor], Tensor] | None:
        """Return what `enter` does to the first positions, which is checked; None to observe it."""
        return None

    def places(self, positions: Positions) -> Tensor:
        """Return the positions of a pass as a table may be asked for them: (batch, new)."""
        if self.max_positions is None:
            return positions.indices
        # What is drafted past a row's limit is never accepted, but is computed beside other rows.
        return positions.indices.clamp(max=self.max_positions - 1)

    def extras(self, x: Tensor, positions: Positions) -> dict[str, Any]:  # noqa: ARG002
        """Return what layers are given beside the usual arguments, by the names in `EXTRAS`.

        Args:
            x: The hidden states of a pass.
            positions: Of the pass.
        """
        return {}

    def _run(self, x: Tensor, run: LayerRun) -> Tensor:
        """Run layers on hidden states: (batch, new, d_model)."""
        positions, cache, layers = run
        cache.begin_pass(positions)
        injects = positions.injects
        if injects and layers and layers[0][2] == (0,):
            x = injected(x, positions, -1)
        arguments: dict[LayerCall, tuple[dict[str, Any], LayerInputs | None]] = {}
        for call, some in groupby(layers, key=itemgetter(1)):
            both = arguments.get(call)
            if both is None:
                given = self._arguments(x, run, call)
                both = arguments[call] = given, layer_inputs(self.decoder, x, given)
            given, inputs = both
            for layer, _, numbers in some:
                kind = None if inputs is None else kind_of(layer)
                if kind is None or inputs is None:
                    x = layer(x, **given)
                else:
                    x = run_layer(layer, kind, x, inputs)
                if isinstance(x, tuple):
                    x = x[0]
                if injects:
                    for number in numbers:
                        x = injected(x, positions, number)
        return x

    def _arguments(self, x: Tensor, run: LayerRun, call: LayerCall) -> dict[str, Any]:
        """Return what layers that are called alike are given beside the hidden states."""
        positions, kind = run.positions, call.rotary
        held: Any = run.cache
        known: dict[str, Any] = {
            "attention_mask": self.mask(x, positions, call.mask),
            "position_ids": self.places(positions),
            "position_embeddings": None if kind is None else self.rotary[kind](x, positions),
            "use_cache": True,
        }
        source = positions.encoder
        if source is not None:
            known["encoder_hidden_states"] = source.states
            known["encoder_attention_mask"] = self._source_mask(x, source)
            if "encoder_hidden_states" in call.names:
                held = CrossCache(run.cache, source)
        known |= dict.fromkeys(CACHE_NAMES, held)
        if self.EXTRAS:
            known |= self.extras(x, positions)
        return dict(zip(call.names, map(known.get, call.names), strict=True))

    def _source_mask(self, x: Tensor, source: EncoderContext) -> Tensor:
        """Return the mask of cross-attention as the layers' implementation takes it."""
        seen = source.visible[:, None, None].expand(-1, 1, x.shape[1], -1)
        eager = self.decoder.config._attn_implementation == "eager"
        return additive(seen, x.dtype) if eager else seen


@cache
def added_after(exit_layer: int, depth: int, blocks: int) -> tuple[tuple[int, ...], ...]:
    """Return what a draft's blocks are given of what the target adds to its states.

    Each block stands for some of the target's layers from the exit layer on, in order. What is
    added within them comes before the block, as what is added after the last of them comes after.

    Args:
        exit_layer: The exit layer.
        depth: Layers of the target.
        blocks: Blocks of the draft.

    Returns:
        The layers whose additions come before the first block, after it, after the second ...
    """
    ends = [exit_layer + number * (depth - exit_layer) // blocks for number in range(blocks + 1)]
    found: list[list[int]] = [[] for _ in ends]
    for layer in range(exit_layer, depth):
        block = bisect_right(ends, layer) - 1
        found[block + 1 if layer + 1 == ends[block + 1] else block].append(layer)
    return tuple(map(tuple, found))


def injected(x: Tensor, positions: Positions, number: int) -> Tensor:
    """Return hidden states with what is added to them after a layer, -1 for before the first."""
    added = positions.injection(number, x)
    return x if added is None else x + added
