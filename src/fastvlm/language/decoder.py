"""A checkpoint's decoder as three calls: embed, run any range of its layers, head."""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language.cache import DecoderCache, KeyValueCache
from fastvlm.language.draft_path import DraftPath, DraftsAhead
from fastvlm.language.masks import FULL, MaskKind, additive
from fastvlm.language.positions import Positions
from fastvlm.language.quantised import Int4Linear, Int8Linear
from fastvlm.language.structure import attends_causally, device_and_dtype_of, part_names


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


class SplitDecoder(ABC):
    """A checkpoint's decoder: its own modules, our loop over its layers. One class for each family.

    What a user may exchange between two requests (the LM head, the embedding, device and precision)
    is read from the model each time, so that a model that was resized, cast or adapted is decoded
    as it is.

    Args:
        model: The model that the decoder is part of. It is not kept alive.
        decoder: The decoder, as `transformers` made it.
    """

    runtime = "torch"
    """What computes the layers, see `RuntimeOptions`."""
    bits: int | None = None
    """Bits of weights of its own; None where it reads those of the model's modules."""
    recomputes = False
    """Whether a verify computes all layers of positions whose first ones a draft has computed."""
    width: int
    """Size of the hidden states (d_model)."""
    context: int
    """Positions that the model was made for."""
    max_positions: int | None = None
    """Positions that there are, where a table ends; None where a reply may go beyond `context`."""
    ahead: DraftsAhead | None = None
    """What runs several draft steps in one call, on the decoder's own cache; None for nothing."""
    restart: int | None = None
    """The length at which `generate` forgets a row's keys and values and computes all anew, with
    other rotations; None for never."""

    def __init__(self, model: PreTrainedModel, decoder: Any) -> None:
        self.decoder = decoder
        self.part_names = part_names(decoder)
        """What the decoder calls its parts: a name stays while what it stands for may change."""
        self.is_causal = attends_causally(decoder)
        """Whether the layers attend causally where they are given no mask."""
        self._model = weakref.ref(model)

    @property
    def prepared(self) -> int:
        """How often a pass has prepared others like it, which takes a multiple of what they do."""
        return 0 if self.ahead is None else self.ahead.prepared

    def room(self, length: int) -> int | None:
        """Return how many tokens a reply may have; None for any number.

        Args:
            length: Positions of its prompt.
        """
        return None if self.max_positions is None else self.context - length

    @property
    def ending(self) -> str:
        """Where a reply without room ends, to end a sentence with."""
        return f"where the model's {self.context} positions end"

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

    @property
    def model(self) -> PreTrainedModel:
        """The model that the decoder is part of.

        Raises:
            ReferenceError: Nobody holds it any more.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("The model of this decoder is gone; keep a reference to it.")
        return model

    @property
    def layers(self) -> Any:
        """The target's own layers."""
        return getattr(self.decoder, self.part_names["layers"])

    @property
    def depth(self) -> int:
        """Layers of the target (L)."""
        return len(self.layers)

    @property
    def embedding(self) -> Any:
        """The module that embeds tokens."""
        return getattr(self.decoder, self.part_names["embed_tokens"])

    @property
    def lm_head(self) -> Any:
        """The module that makes logits of normed hidden states."""
        return self.model.get_output_embeddings()

    @property
    def vocabulary_size(self) -> int:
        """Logits that there are."""
        size: int | None = getattr(self.lm_head, "out_features", None)
        return self.decoder.config.vocab_size if size is None else size

    @property
    def device(self) -> torch.device:
        """Where hidden states are computed."""
        return self.device_and_dtype()[0]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of hidden states."""
        return self.device_and_dtype()[1]

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Return the device and the precision that hidden states have."""
        return device_and_dtype_of(self.embedding)

    def cache(self, slots: int = 0, capacity: int = 0) -> DecoderCache:
        """Return an empty cache."""
        return DecoderCache(self.device, slots, capacity)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens: (batch, new) to (batch, new, d_embedding).

        They are d_model wide but where a model projects them first, which `forward_layers` does.
        """
        return self.embedding(token_ids)

    @abstractmethod
    def forward_layers(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Iterable[int]
    ) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states.

        Before layer 0 the states are embeddings, as `embed` gives them.
        """

    def forward_all(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        exit_layer: int = 0,
        *,
        logits: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Run all layers on embeddings, (batch, new, d_embedding).

        Returns:
            The hidden states after `exit_layer` layers, None for 0, and after all: (batch, new,
            d_model) each; in place of the last ones their logits, if asked for.
        """
        exits = None
        if exit_layer:
            exits = x = self.forward_layers(x, positions, cache, range(exit_layer))
        x = self.forward_layers(x, positions, cache, range(exit_layer, self.depth))
        return exits, self.head(x) if logits else x

    def forward_tokens(
        self,
        token_ids: Sequence[Sequence[int]],
        positions: Positions,
        cache: KeyValueCache,
        exit_layer: int = 0,
    ) -> tuple[Tensor | None, Tensor]:
        """Run the whole model on rows of tokens, equally many in each.

        Returns:
            The hidden states after `exit_layer` layers, (batch, new, d_model), None for 0; and the
            logits, (batch, new, vocabulary).
        """
        x = self.embed(torch.tensor(token_ids, device=positions.indices.device))
        return self.forward_all(x, positions, cache, exit_layer, logits=True)

    @abstractmethod
    def forward_blocks(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        blocks: Iterable[nn.Module],
        exit_layer: int,
    ) -> Tensor:
        """Run layers of the target's own kind that are not its own: (batch, new, d_model).

        Args:
            x: The exit layer's hidden states.
            positions: Their positions.
            cache: Where the layers keep their keys and values.
            blocks: The layers, which stand for the target's from the exit layer on.
            exit_layer: How many of the target's layers came before.
        """

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Return what the LM head is given, after the final norm: (batch, new, d_model)."""

    def logits(self, x: Tensor) -> Tensor:
        """Return what the family makes of the LM head's outputs, of any shape: soft-capped ones."""
        return x

    def raw_logits(self, x: Tensor) -> Tensor:
        """Return the LM head's outputs of normed states: (..., d_model) to (..., vocabulary)."""
        return self.lm_head(x)

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, new, d_model): `norm`, LM head, `logits`."""
        return self.logits(self.raw_logits(self.norm(x)))

    def head_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the logits of the tokens of some `lm_head_rows`: (batch, new, tokens)."""
        return self.logits(F.linear(self.norm(x), rows))

    def draft_step(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, path: DraftPath
    ) -> tuple[Tensor, Tensor]:
        """Run a draft step on embeddings, (batch, new, d_embedding); the last token is the new one.

        Returns:
            The exit layer's hidden states, (batch, new, d_model), and logits, (batch, new, tokens).
        """
        exits = x = self.forward_layers(x, positions, cache, range(path.exit_layer))
        if path.blocks:
            x = self.forward_blocks(x, positions, cache, path.blocks, path.exit_layer)
        elif path.mlp is not None:
            x = path.mlp(x)
        return exits, self.head(x) if path.rows is None else self.head_rows(x, path.rows)

    def follow(self) -> int:
        """Take over what has changed about the model, as far as it is not read at each call.

        The engine calls it before requests enter. Return the most bytes of a cache that stay for
        them; 0 where passes over its memory are no shorter, or the model has changed.
        """
        if self.ahead is not None:
            self.ahead.follow()
        return 0

    def lm_head_rows(self, token_ids: Tensor) -> Tensor | None:
        """Return the LM head's rows of some tokens: (tokens, its inputs).

        None where they are not all there is to it: quantised by others, adapted or offloaded.
        """
        head = self.lm_head
        if isinstance(head, Int8Linear | Int4Linear) and head.bias is None:
            return head.rows(token_ids).to(self.dtype)
        weight = getattr(head, "weight", None)
        # Quantised weights are of other classes, adapters are modules around the head.
        if not isinstance(head, nn.Linear) or type(weight) is not nn.Parameter:
            return None
        elsewhere = weight.is_meta or hasattr(head, "_hf_hook")
        if elsewhere or not weight.is_floating_point() or head.bias is not None:
            return None
        return weight.detach()[token_ids]

    def position_keys(self, keys: Sequence[Hashable], prompt_length: int) -> Sequence[Hashable]:  # noqa: ARG002
        """Return what tells states of positions from others, by what tells their tokens.

        Where rotations depend on more than the position, so do the keys, and states serve another
        prompt only where it is the same.

        Args:
            keys: Of the positions from the first on.
            prompt_length: Positions of the prompt that they begin with.
        """
        return keys

    def mask(self, x: Tensor, positions: Positions, kind: MaskKind = FULL) -> Tensor | None:
        """Return the mask that the layers' implementation of attention takes.

        Args:
            x: The hidden states.
            positions: Of the pass.
            kind: What the layers see.

        Raises:
            InputError: It takes none that tells the rows of a batch apart.
        """
        implementation = self.decoder.config._attn_implementation
        if implementation == "sdpa":
            found = positions.mask(kind)
            # Without a mask, attention goes by what its module says of itself.
            return positions.visible(kind) if found is None and not self.is_causal else found
        if implementation == "eager":
            # Its attention knows no causal rule and adds what it is given.
            return additive(positions.visible(kind), x.dtype)
        raise InputError(
            f"fastvlm decodes with the attention implementations sdpa and eager; this model was"
            f" loaded with {implementation!r}. Load it with attn_implementation='sdpa'."
        )


def cache_name(module: nn.Module) -> str:
    """Return what a model or a layer calls its cache: releases of `transformers` differ in it."""
    names = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in names else "past_key_values"
