"""A checkpoint's decoder as three calls: embed, run any range of its layers, head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastvlm.functional.errors import InputError
from fastvlm.language.cache import DecoderCache, KeyValueCache, Span


class SplitDecoder(Protocol):
    """What the cycle needs of a decoder; every family of models gives it."""

    depth: int
    """Layers of the target (L)."""
    width: int
    """Size of the hidden states (d_model)."""
    context: int
    """The most positions that the model was made for."""
    device: torch.device
    dtype: torch.dtype
    layers: Sequence[nn.Module]
    """The target's own layers."""

    def cache(self, batch: int, capacity: int, extra_layers: int = 0) -> DecoderCache:
        """Return an empty cache, with `extra_layers` for an imitation network."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens: (batch, new) to (batch, new, d_embedding).

        They are d_model wide but where a model projects them first, which `run` does.
        """
        ...

    def run(self, x: Tensor, span: Span, cache: KeyValueCache, layers: Iterable[int]) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states.

        Before layer 0 the states are embeddings, as `embed` gives them.
        """
        ...

    def run_blocks(
        self, x: Tensor, span: Span, cache: KeyValueCache, blocks: Iterable[nn.Module]
    ) -> Tensor:
        """Run layers of the target's own kind that are not the target's."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """Return what the LM head is given: the final norm of hidden states, and what follows."""
        ...

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, new, d_model): `norm`, then LM head."""
        ...

    def head_rows(self, tokens: Tensor) -> Tensor:
        """Return the LM head's rows of some tokens: (tokens, its inputs).

        Raises:
            InputError: The LM head's weights can't be read: they are quantised or elsewhere.
        """
        ...


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What an imitation network takes over from a decoder's configuration.

    Args:
        depth: Layers.
        width: Size of the hidden states (d_model).
        hidden: Size inside the feed-forward part.
        eps: What a norm adds to a variance.
    """

    depth: int
    width: int
    hidden: int
    eps: float


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The weights of a layer's gated feed-forward part.

    Args:
        norm: Of the norm before it: (d_model,).
        gate: (hidden, d_model).
        up: (hidden, d_model).
        down: (d_model, hidden).
    """

    norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class LayeredDecoder(ABC):
    """What the families share: the checkpoint's own layers, our loop over them.

    Args:
        decoder: The decoder, as `transformers` made it.
        lm_head: The LM head.
        layers: The decoder's layers.
    """

    width: int
    context: int
    kv_heads: int
    head_dim: int

    def __init__(self, decoder: Any, lm_head: nn.Linear, layers: Iterable[nn.Module]) -> None:
        self.decoder, self.lm_head = decoder, lm_head
        self.layers: list[nn.Module] = list(layers)
        self.depth = len(self.layers)
        self.embedding: nn.Module = decoder.embed_tokens
        self.device, self.dtype = placement(self.embedding)

    @staticmethod
    @abstractmethod
    def shape(config: Any) -> DecoderShape:
        """Return the shape of the decoder of a configuration."""

    @staticmethod
    @abstractmethod
    def blocks(config: Any, number: int, first_index: int) -> nn.ModuleList:
        """Return untrained layers of the family, which cache as layers from `first_index` on."""

    @staticmethod
    @abstractmethod
    def feed_forward(layer: Any) -> FeedForward | None:
        """Return a layer's gated feed-forward part; None where the family has none."""

    def cache(self, batch: int, capacity: int, extra_layers: int = 0) -> DecoderCache:
        """Return an empty cache, with `extra_layers` for an imitation network."""
        return DecoderCache(
            layers=self.depth + extra_layers,
            batch=batch,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens: (batch, new) to (batch, new, d_embedding)."""
        return self.embedding(tokens)

    @abstractmethod
    def run(self, x: Tensor, span: Span, cache: KeyValueCache, layers: Iterable[int]) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states."""

    @abstractmethod
    def run_blocks(
        self, x: Tensor, span: Span, cache: KeyValueCache, blocks: Iterable[nn.Module]
    ) -> Tensor:
        """Run layers of the target's own kind that are not the target's."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Return what the LM head is given: the final norm of hidden states, and what follows."""

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, new, d_model): `norm`, then LM head."""
        return self.lm_head(self.norm(x))

    def head_rows(self, tokens: Tensor) -> Tensor:
        """Return the LM head's rows of some tokens: (tokens, its inputs).

        Raises:
            InputError: The LM head's weights can't be read: they are quantised or elsewhere.
        """
        weight: Any = self.lm_head.weight
        # Quantised modules have integers for weights, or a function that unpacks them.
        quantised = not isinstance(weight, Tensor) or not weight.is_floating_point()
        if quantised or weight.is_meta:
            raise InputError(
                "A draft with a vocabulary of its own needs the rows of the target's LM head, but"
                f" they are {'quantised' if quantised else 'offloaded'} here; leave the LM head on"
                " the device and in floating point."
            )
        return weight[tokens]

    def mask(self, x: Tensor, span: Span, window: int | None = None) -> Tensor | None:
        """Return the mask that the layers' implementation of attention takes.

        Raises:
            InputError: It takes none that tells the rows of a batch apart.
        """
        implementation = self.decoder.config._attn_implementation
        if implementation == "sdpa":
            return span.mask(window)
        if implementation == "eager":
            # Its attention knows no causal rule and adds what it is given.
            return additive(span.seen(window), x.dtype)
        raise InputError(
            f"fastvlm decodes with the attention implementations sdpa and eager; this model was"
            f" loaded with {implementation!r}. Load it with attn_implementation='sdpa'."
        )


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to attention scores: 0 where something is seen."""
    # The least number rather than minus infinity: a row that sees nothing stays finite.
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@torch.no_grad()
def placement(embedding: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and the precision that hidden states have in a model.

    They are what comes out of the embedding: its weights may lie elsewhere until they are needed,
    or be quantised.
    """
    weight: Tensor = next(embedding.parameters())
    start = torch.device("cpu") if weight.is_meta else weight.device
    found: Tensor = embedding(torch.zeros(1, 1, dtype=torch.long, device=start))
    return found.device, found.dtype


def layers_of(config: PreTrainedConfig) -> Any:
    """Return a small untrained model of a configuration, for the sake of its layers.

    The classes of a family's layers are so found without naming each.
    """
    from transformers import AutoModel

    config.vocab_size = 1
    config.pad_token_id = None
    return AutoModel.from_config(config)
