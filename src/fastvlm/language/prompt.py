"""What a model hands to its decoder: the prompt, with everything but the decoder done.

Encoding and packing pictures, merging their features into the embeddings, placing them in three
axes: each family of vision-language models does it in its own way, and does it itself here. We
stop it where its decoder would start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language.families import text_decoder

UNKNOWN = -1
"""Stands for a prompt's token where only its embedding was given."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's prompt, without padding.

    Args:
        tokens: Its tokens; `UNKNOWN` where a model was given embeddings alone. For an
            encoder-decoder they are the decoder's.
        embeddings: What the decoder is given for them: (length, d_embedding).
        positions: Time, height and width of each position, (3, length), for a model that tells
            them apart; None for 0, 1, 2 ...
        memory: An encoder-decoder's encoded source, (source, d_model); None for other models.
    """

    tokens: list[int]
    embeddings: Tensor
    positions: Tensor | None = None
    memory: Tensor | None = None


def captured(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Prompt]:
    """Let a model prepare its inputs, and return what its decoder would be given.

    The model's own `forward` runs up to its decoder, and leaves nothing behind.

    Args:
        model: A causal, an encoder-decoder or a vision-language model.
        inputs: What its `generate` was given or hands to the first `forward`: `input_ids` or
            `inputs_embeds`, `attention_mask`, `pixel_values` and so on, of one row or more.

    Returns:
        A prompt for each row, which starts at position 0.

    Raises:
        InputError: The inputs go on from a filled cache, or have positions of their own or a mask
            that is about more than padding.
    """
    given = completed(model, inputs)
    named = decoder_inputs(model, given)
    decoder = text_decoder(model)
    states: Tensor | None = named.get("encoder_hidden_states")
    tokens: Tensor | None = named.get("input_ids")
    embeddings: Tensor | None = named.get("inputs_embeds")
    if tokens is None and embeddings is None:
        assert states is not None  # any other decoder was given one of them
        tokens = torch.full((len(states), 1), start_token(model), device=states.device)
    if embeddings is None:
        with torch.no_grad():
            embeddings = decoder.get_input_embeddings()(tokens)
    if tokens is None and states is None:
        tokens = given.get("input_ids")
    if tokens is None:
        tokens = torch.full(embeddings.shape[:2], UNKNOWN)
    positions: Tensor | None = named.get("position_ids")
    own = row_masks(
        [named.get("attention_mask"), given.get("attention_mask") if states is None else None],
        embeddings,
    )
    if states is None:
        memories: list[Tensor | None] = [None] * len(own)
    else:
        seen = row_masks([named.get("encoder_attention_mask")], states)
        memories = [row[mask] for row, mask in zip(states, seen, strict=True)]
    return [
        Prompt(
            tokens[row][mask.to(tokens.device)].tolist(),
            embeddings[row][mask],
            None if positions is None else row_positions(positions, row, mask),
            memory,
        )
        for row, (mask, memory) in enumerate(zip(own, memories, strict=True))
    ]


def decoder_inputs(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Run a model up to its decoder, and return the keyword arguments of that call."""

    def stop(_: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _Reached(named)

    hook = text_decoder(model).register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with _kept_offsets(model), torch.no_grad():
            model(**given)
    except _Reached as reached:
        return reached.named
    finally:
        hook.remove()
    raise InputError(f"{type(model).__name__} did not call its decoder.")


class _Reached(Exception):  # noqa: N818
    """The decoder was called."""

    def __init__(self, named: dict[str, Any]) -> None:
        super().__init__()
        self.named = named


@contextmanager
def _kept_offsets(model: PreTrainedModel) -> Iterator[None]:
    """Keep what Qwen2-VL remembers from one `forward` to the next."""
    base: Any = model.base_model
    if not hasattr(base, "rope_deltas"):
        yield
        return
    before = base.rope_deltas
    # Those of another prompt would move this one's.
    base.rope_deltas = None
    try:
        yield
    finally:
        base.rope_deltas = before


def completed(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs as `forward` takes them.

    Raises:
        InputError: They go on from a cache that holds something.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    cache = given.pop("past_key_values", None)
    if cache is not None and int(cache.get_seq_length()):
        raise InputError(
            f"The prompt goes on from {int(cache.get_seq_length())} positions in a cache of"
            " transformers, which fastvlm can't take over; give it the whole prompt."
        )
    config: Any = model.config
    queries = getattr(config, "num_query_tokens", None)
    if queries and "input_ids" not in given and "inputs_embeds" not in given:
        # BLIP-2 describes a picture without being asked, and its `generate` starts so.
        row = [config.image_token_id] * queries + [config.text_config.bos_token_id]
        pixels: Tensor = given["pixel_values"]
        given["input_ids"] = torch.tensor([row] * len(pixels), device=pixels.device)
    return given


def start_token(model: PreTrainedModel) -> int:
    """Return the token that an encoder-decoder's reply starts with.

    Raises:
        InputError: Neither the model's nor its generation configuration says which.
    """
    settings: list[Any] = [*generation_configs(model), text_decoder(model).config]
    for name in ("decoder_start_token_id", "bos_token_id"):
        for found in settings:
            token = getattr(found, name, None)
            if token is not None:
                return int(token)
    raise InputError(
        f"{type(model).__name__} doesn't say which token a reply starts with; set"
        " generation_config.decoder_start_token_id."
    )


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens that end a model's reply."""
    for config in generation_configs(model):
        ends = config.eos_token_id
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()


def generation_configs(model: PreTrainedModel) -> list[Any]:
    """Return what says how replies are generated, the most particular first.

    A whole language model inside another, as in BLIP-2, has one of its own and goes by that.
    """
    owners = (model.get_decoder(), model)
    found = [getattr(owner, "generation_config", None) for owner in owners]
    return [config for config in found if config is not None]


def row_masks(masks: Sequence[Any], states: Tensor) -> Tensor:
    """Return which positions are a row's own, and not padding: (batch, length).

    Args:
        masks: Where it may stand, (batch, length), the best first; None where it doesn't.
        states: What has these positions: (batch, length, width).

    Raises:
        InputError: Only a mask of another shape is there.
    """
    given = [mask for mask in masks if mask is not None]
    for mask in given:
        if isinstance(mask, Tensor) and mask.shape == states.shape[:2]:
            return mask.to(states.device, torch.bool)
    if given:
        other = tuple(given[0].shape) if isinstance(given[0], Tensor) else type(given[0]).__name__
        raise InputError(
            f"An attention mask says which of {tuple(states.shape[:2])} tokens are padding; got"
            f" {other}."
        )
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


def row_positions(positions: Tensor, row: int, mask: Tensor) -> Tensor | None:
    """Return a row's positions in three axes, (3, length); None for 0, 1, 2 ...

    Args:
        positions: (batch or 1, length), or (3 or 4, batch or 1, length), of which the last three
            are time, height and width.
        row: The row.
        mask: Which positions are the row's own: (length,).

    Raises:
        InputError: A model with one axis was given other positions than 0, 1, 2 ...
    """
    row = min(row, positions.shape[-2] - 1)
    own = positions[..., row, :][..., mask.to(positions.device)]
    counted = torch.arange(own.shape[-1], device=own.device)
    if bool((own == counted).all()):
        return None
    if own.dim() == 1:
        raise InputError(
            "A prompt's positions count up from 0 without gaps; got"
            f" {', '.join(map(str, own[:8].tolist()))} ... Leave out position_ids."
        )
    return own[-3:]
