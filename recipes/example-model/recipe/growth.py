"""A larger decoder, and its draft, that compute what smaller ones do, to be trained on from there.

Wider by repeating every channel (Chen et al. 2016, Net2Net), deeper by layers whose branches add
nothing yet (Chen et al. 2022, bert2BERT, copies its neighbours; here the copy's last products are
zero). Repeated channels would learn the same for ever, so what reads them is shared out unevenly.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import FastVlmForConditionalGeneration

from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import ImitationConfig, ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import written_directory
from fastvlm.functional.placement import moved
from recipe.model import read_model

UNEVEN = 0.5
"""How far the shares of a repeated channel lie about an even one."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a decoder becomes.

    Args:
        times: How many times as wide, in channels, heads and hidden units.
        layers: How deep; None for as deep as it is.
    """

    times: int = 1
    layers: int | None = None


def grown(
    model: FastVlmForConditionalGeneration, size: Size, seed: int = 0
) -> FastVlmForConditionalGeneration:
    """Return a model with a larger decoder and the same logits; its encoder is the same.

    Heads keep their size and become more, as rotary positions are bound to it. New layers are
    spread evenly among those that are there.

    Args:
        model: A model around a Qwen2 with tied embeddings.
        size: How large its decoder becomes; where it is that already, the model is returned.
        seed: Decides the shares.

    Raises:
        InputError: The decoder would become smaller, or is none that can be grown.
    """
    text = cast(Any, model.config).text_config
    depth, width = text.num_hidden_layers, size.times
    layers = depth if size.layers is None else size.layers
    if (width, layers) == (1, depth):
        return model
    if text.model_type != "qwen2" or not text.tie_word_embeddings:
        raise InputError("Only a Qwen2 decoder with tied embeddings can be grown.")
    if layers < depth:
        raise InputError(f"The decoder has {depth} layers, and can't shrink to {layers}.")
    config = copy.deepcopy(model.config)
    wider = cast(Any, config).text_config
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(wider, name, width * getattr(text, name))
    wider.num_hidden_layers = layers
    wider.layer_types = [text.layer_types[0]] * layers
    result = moved(FastVlmForConditionalGeneration(config), model.dtype)
    result.model.vision_tower = model.model.vision_tower
    result.generation_config = copy.deepcopy(model.generation_config)
    widen = Widening(width, torch.Generator().manual_seed(seed))
    old, new = model.model, result.model
    widen.linear(
        old.multi_modal_projector.linear_1, new.multi_modal_projector.linear_1, reads=False
    )
    widen.linear(old.multi_modal_projector.linear_2, new.multi_modal_projector.linear_2)
    new.language_model.embed_tokens.weight.data = repeated(
        old.language_model.embed_tokens.weight.data, width, 1
    )
    # The head reads the embeddings as they are, so its shares lie in the norm before it.
    norm = old.language_model.norm.weight.data
    new.language_model.norm.weight.data = (widen.shares(norm[None])[0]).contiguous()
    sources = spread(depth, layers)
    for place, source in enumerate(sources):
        widen.layer(old.language_model.layers[source], new.language_model.layers[place])
        if place and sources[place - 1] == source:
            added = cast(Any, new.language_model.layers[place])
            for last in (added.self_attn.o_proj, added.mlp.down_proj):
                nn.init.zeros_(last.weight)
    result.tie_weights()
    return result


def grown_draft(
    network: ImitationNetwork, model: FastVlmForConditionalGeneration, seed: int = 1
) -> ImitationNetwork:
    """Return a draft of a grown model that drafts what the small model's draft did.

    Args:
        network: The draft of the small model.
        model: The grown model.
        seed: Decides the shares.
    """
    text = cast(Any, model.config).text_config
    small = cast(dict[str, Any], network.config.text_config)
    times = text.hidden_size // small["hidden_size"]
    sources = spread(small["num_hidden_layers"], text.num_hidden_layers)
    config = ImitationConfig.from_dict(network.config.to_dict())
    config.text_config, config.target = text.to_dict(), fingerprint(model)
    # Copies of the exit layer add nothing, so its first one is the same exit.
    config.exit_layer = sources.index(network.config.exit_layer - 1) + 1
    result = moved(ImitationNetwork(config), network.dtype)
    widen = Widening(times, torch.Generator().manual_seed(seed))
    for old, new in zip(network.layers, result.layers, strict=True):
        widen.layer(old, new)
    if network.mlp is not None and result.mlp is not None:
        result.mlp.norm.weight.data = repeated(network.mlp.norm.weight.data, times, 0)
        widen.feed_forward(network.mlp, result.mlp)
    if network.draft_vocabulary is not None and result.draft_vocabulary is not None:
        result.draft_vocabulary.copy_(network.draft_vocabulary)
    return result


def grow_both(start: Path, draft: Path, output: Path, size: Size) -> None:
    """Grow a model and its draft, and save them as `output/model` and `output/draft`.

    They are saved in float32: rounded shares would no longer add up to what they were.

    Raises:
        CheckpointError: There is no such model or draft.
        InputError: The decoder can't be grown to that size.
    """
    model, tokenizer = read_model(start)
    network = load_draft(draft, model)
    larger = grown(model, size)
    larger_draft = grown_draft(network, larger)
    with written_directory(output / "draft") as beside:
        larger_draft.save_pretrained(beside)
    with written_directory(output / "model") as beside:
        tokenizer.save_pretrained(beside)
        larger.save_pretrained(beside)


def spread(depth: int, layers: int) -> list[int]:
    """Return the old layer that each new one is made from, in order; none is left out."""
    return [place * depth // layers for place in range(layers)]


def repeated(x: Tensor, times: int, dim: int) -> Tensor:
    """Return a tensor repeated along a dimension."""
    return torch.cat([x] * times, dim)


class Widening:
    """Copies layers into ones that are a whole number of times as wide.

    Args:
        times: That number.
        generator: Draws the shares in which repeated channels are read.
    """

    def __init__(self, times: int, generator: torch.Generator) -> None:
        self.times, self.generator = times, generator

    def shares(self, weight: Tensor) -> Tensor:
        """Return weights for a repeated input: (out, in) to (out, times in), which sum to them."""
        noise = torch.rand(
            (self.times, *weight.shape), generator=self.generator, dtype=weight.dtype
        )
        share = 1 + UNEVEN * (noise - noise.mean(0))
        return torch.cat([weight * part / self.times for part in share], 1)

    def linear(self, old: Any, new: Any, *, reads: bool = True, writes: bool = True) -> None:
        """Copy a linear layer.

        Args:
            old: The layer.
            new: The wider one.
            reads: Whether its input is repeated.
            writes: Whether its output is.
        """
        weight = self.shares(old.weight.data) if reads else old.weight.data.clone()
        new.weight.data = repeated(weight, self.times, 0) if writes else weight
        if old.bias is not None:
            new.bias.data = repeated(old.bias.data, self.times, 0)

    def layer(self, old: Any, new: Any) -> None:
        """Copy a decoder layer: its norms see the same mean square as before."""
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(new, name).weight.data = repeated(getattr(old, name).weight.data, self.times, 0)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.linear(getattr(old.self_attn, name), getattr(new.self_attn, name))
        self.feed_forward(old.mlp, new.mlp)

    def feed_forward(self, old: Any, new: Any) -> None:
        """Copy a gated feed-forward network."""
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.linear(getattr(old, name), getattr(new, name))
