"""The rotary family: Llama, Mistral, Qwen2, Qwen3, and Qwen2-VL with positions in three axes."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastvlm.language.cache import KeyValueCache
from fastvlm.language.decoder import DecoderShape, FeedForward, SplitDecoder, layers_of
from fastvlm.language.positions import Positions

TABLE_BLOCK = 256
"""Positions that a table of rotations has beyond those that are asked for."""


class RotaryDecoder(SplitDecoder):
    """A decoder whose layers rotate queries and keys by their positions.

    Args:
        model: The model that the decoder is part of.
        decoder: A `LlamaModel` or one of the same parts: `embed_tokens`, `layers`, `norm` and
            `rotary_emb`.
    """

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        super().__init__(model, decoder)
        # Which fields a configuration has is its family's matter.
        config: Any = decoder.config
        self.width = config.hidden_size
        self.context = scaled_context(config)
        self.window: int | None = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        self.slides = [
            self.window is not None and (kinds is None or kinds[index] == "sliding_attention")
            for index in range(self.depth)
        ]
        self.rotary = Rotary(decoder.rotary_emb)

    @staticmethod
    def shape(config: Any) -> DecoderShape:
        """Return the shape of the decoder of a configuration."""
        return DecoderShape(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.rms_norm_eps,
        )

    @staticmethod
    def blocks(config: Any, number: int, first_index: int) -> nn.ModuleList:
        """Return untrained layers of the family, which cache as layers from `first_index` on."""
        fields = {name: v for name, v in config.to_dict().items() if name != "layer_types"}
        layers = layers_of(type(config)(**{**fields, "num_hidden_layers": number})).layers
        for offset, layer in enumerate(layers):
            layer.self_attn.layer_idx = first_index + offset
        return layers

    @staticmethod
    def feed_forward(layer: Any) -> FeedForward:
        """Return a layer's gated feed-forward part."""
        return FeedForward(
            layer.post_attention_layernorm.weight,
            layer.mlp.gate_proj.weight,
            layer.mlp.up_proj.weight,
            layer.mlp.down_proj.weight,
        )

    def forward_layers(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Iterable[int]
    ) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states."""
        # Going through a list of modules is faster than looking each up by its number.
        own = tuple(self.layers)
        return self._run(
            x, positions, cache, [(own[index], self.slides[index]) for index in layers]
        )

    def forward_blocks(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, blocks: Iterable[nn.Module]
    ) -> Tensor:
        """Run layers of the target's own kind that are not the target's."""
        return self._run(x, positions, cache, [(block, self.slides[-1]) for block in blocks])

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of hidden states."""
        return self.decoder.norm(x)

    def position_keys(self, keys: Sequence[Hashable], prompt_length: int) -> Sequence[Hashable]:
        """Return what tells states of positions from others. See `SplitDecoder.position_keys`."""
        if self.rotary.is_static:
            return keys
        regime = self.rotary.regime
        return [(regime(place, prompt_length), key) for place, key in enumerate(keys)]

    def _run(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        layers: Sequence[tuple[nn.Module, bool]],
    ) -> Tensor:
        cache.begin_pass(positions)
        rotations = self.rotary(x, positions)
        slides = any(slides for _, slides in layers)
        masks = self.mask(x, positions), self.mask(x, positions, self.window) if slides else None
        for layer, sliding in layers:
            x = layer(
                x,
                attention_mask=masks[sliding],
                position_ids=positions.indices,
                past_key_values=cache,
                position_embeddings=rotations,
                use_cache=True,
            )
        return x


class Rotary:
    """The cosines and sines of positions, as a model's own module gives them to `generate`.

    The module itself is never changed: with some kinds of scaling it keeps the frequencies of what
    it saw last, which is no other request's business.

    Args:
        module: The model's `rotary_emb`.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        parameters: Any = module.config.rope_parameters
        self.kind: str = parameters["rope_type"]
        own: int = module.config.max_position_embeddings
        longrope = self.kind == "longrope"
        self.original = parameters["original_max_position_embeddings"] if longrope else own

    @property
    def is_static(self) -> bool:
        """Whether a position's rotation depends on the position alone."""
        return self.kind != "longrope" and "dynamic" not in self.kind

    def __call__(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (batch, width, head_dim) each, in the precision of `x`."""
        if self.is_static and positions.position_ids is None:
            return self._from_table(x, positions)
        if self.is_static:
            return self.module(x, positions.position_ids)
        return self._scaled(x, positions)

    def regime(self, position: int, prompt_length: int) -> int:
        """Return the length that a position's frequencies are for; 0 for the original ones.

        `generate` computes a prompt with the frequencies of the whole prompt's length, and then
        each position with those of the length so far.
        """
        length = max(position + 1, prompt_length)
        if self.is_static or length <= self.original:
            return 0
        # LongRoPE has two sets of frequencies, dynamic scaling has one for each length.
        return self.original + 1 if self.kind == "longrope" else length

    def _from_table(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        tables = positions.tables
        if tables is None:
            return self.module(x, positions.indices)
        known: tuple[Tensor, Tensor] | None = tables.get("rotations")
        if known is None or known[0].dtype != x.dtype or len(known[0]) < positions.end:
            counted = torch.arange(positions.end + TABLE_BLOCK, device=positions.indices.device)
            cos, sin = self.module(x, counted[None])
            known = tables["rotations"] = cos[0], sin[0]
        cos, sin = known
        if positions.aligned:
            first = positions.starts[0]
            here = slice(first, first + positions.width)
            return cos[None, here], sin[None, here]
        return cos[positions.indices], sin[positions.indices]

    def _scaled(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return the rotations of a pass whose positions may have frequencies of their own."""
        ids = positions.indices if positions.position_ids is None else positions.position_ids
        regimes = torch.tensor(
            [
                [self.regime(start + offset, length) for offset in range(positions.width)]
                for start, length in zip(positions.starts, positions.prompt_lengths, strict=True)
            ],
            device=x.device,
        )
        found: tuple[Tensor, Tensor] | None = None
        for regime in regimes.unique().tolist():
            one = self._with_frequencies(x, regime)(x, ids)
            if found is None:
                found = one
                continue
            chosen = (regimes == regime)[..., None]
            found = torch.where(chosen, one[0], found[0]), torch.where(chosen, one[1], found[1])
        assert found is not None  # a pass has a position
        return found

    def _with_frequencies(self, x: Tensor, regime: int) -> Any:
        """Return a copy of the module whose frequencies are fixed: those for a length."""
        fixed: Any = copy.copy(self.module)
        fixed._buffers = {name: buffer.clone() for name, buffer in self.module._buffers.items()}
        frequencies = self.module.original_inv_freq.to(x.device)
        if regime:
            initialise = ROPE_INIT_FUNCTIONS[self.kind]
            frequencies, scaling = initialise(self.module.config, x.device, seq_len=regime)
            if self.kind != "longrope":
                fixed.attention_scaling = scaling
        fixed._buffers["inv_freq"] = frequencies
        # The module's own rule would choose frequencies by the greatest position of the pass.
        fixed.rope_type = "default"
        return fixed


def scaled_context(config: Any) -> int:
    """Return the positions that a model was made for, its scaling of rotations included.

    Some configurations name the length before scaling, as `max_position_embeddings` and nowhere
    else.
    """
    parameters = config.rope_parameters
    length: int = config.max_position_embeddings
    scales = parameters["rope_type"] in {"yarn", "dynamic", "linear", "llama3", "longrope"}
    if not scales or parameters.get("original_max_position_embeddings", length) != length:
        return length
    return int(length * (parameters.get("factor") or 1))
