"""What a model hands to its decoder: the prompt, with everything but the decoder done.

Encoding and packing images, merging their features into the embeddings, placing them in three
axes: each family of vision-language models does it in its own way, and does it itself here. We
stop it where its decoder would start.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.functional.overrides import override_method
from fastvlm.language.additions import ADDITIONS, row_injections, row_source, with_images
from fastvlm.language.blocks import RowBlocks, row_blocks
from fastvlm.language.decoder_inputs import UNKNOWN_TOKEN, DecoderInputs
from fastvlm.language.generator import start_token
from fastvlm.language.layer_calls import CACHE_NAMES
from fastvlm.language.structure import text_decoder

USED = frozenset(
    {
        *ADDITIONS,
        *CACHE_NAMES,
        "attention_mask",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "input_ids",
        "inputs_embeds",
        "position_ids",
    }
)
"""Arguments of a decoder that `DecoderInputs` are made of, or that are checked."""
HARMLESS = frozenset(
    {
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
    }
)
"""Arguments of a decoder that say what it returns, and change no hidden state."""

REPLY_STARTS = ("decoder_input_ids", "decoder_inputs_embeds")
"""What an encoder-decoder's `forward` takes for the beginning of a reply."""
SOURCES = ("input_ids", "inputs_embeds", "attention_mask", "pixel_values")
"""What a `forward` takes that has an entry for each row."""


def capture_decoder_inputs(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> list[DecoderInputs]:
    """Let a model prepare its inputs, and return what its decoder would be given.

    The model's own `forward` runs up to its decoder. It leaves nothing behind, and disturbs no
    other thread that uses the model.

    Args:
        model: A causal, an encoder-decoder or a vision-language model.
        inputs: What its `generate` was given or hands to the first `forward`: `input_ids` or
            `inputs_embeds`, `attention_mask`, `pixel_values` and so on, of one row or more.

    Returns:
        The inputs of each row, which start at position 0; `keys` are None.

    Raises:
        InputError: The inputs go on from a filled cache, or have positions of their own or a mask
            that is about more than padding; or the model hands its decoder something else that
            changes what it computes.
    """
    given = normalise_inputs(model, inputs)
    handed = decoder_arguments(model, given)
    decoder = text_decoder(model)
    states: Tensor | None = handed.get("encoder_hidden_states")
    handed = with_images(decoder, handed)
    tokens: Tensor | None = handed.get("input_ids")
    embeddings: Tensor | None = handed.get("inputs_embeds")
    if tokens is None and embeddings is None:
        if states is None:
            raise InputError(
                f"{type(model).__name__} handed its decoder neither tokens nor states."
            )
        tokens = torch.full((len(states), 1), start_token(model), device=states.device)
    if embeddings is None:
        with torch.no_grad():
            embeddings = decoder.get_input_embeddings()(tokens)
    if tokens is None and states is None:
        tokens = given.get("input_ids")
    if tokens is None:
        tokens = torch.full(embeddings.shape[:2], UNKNOWN_TOKEN)
    positions: Tensor | None = handed.get("position_ids")
    handed_mask = handed.get("attention_mask")
    mask = handed_mask
    if states is None and (mask is None or not is_padding_mask(mask, embeddings)):
        mask = given.get("attention_mask")
    own = row_masks(mask, embeddings)
    if positions is None and states is None:
        check_no_gaps(own)
    if states is None:
        if not bool(own[:, -1].all()):
            warnings.warn(
                "The rows are padded on the right; fastvlm leaves padding out, while transformers'"
                " generate decodes from behind it and finds other tokens. Pad on the left.",
                stacklevel=2,
            )
        sources: list[Tensor | None] = [None] * len(own)
    else:
        seen = row_masks(handed.get("encoder_attention_mask"), states)
        sources = [row[mask] for row, mask in zip(states, seen, strict=True)]
    blocks = [RowBlocks()] * len(own)
    if states is None:
        blocks = row_blocks(decoder, handed_mask, own)
    return [
        DecoderInputs(
            tokens[row][mask.to(tokens.device)].tolist(),
            embeddings[row][mask],
            None if positions is None else row_positions(decoder, positions, row, mask),
            *((source, None) if states is not None else row_source(handed, row, mask)),
            *blocks[row],
            row_injections(handed, row, mask, embeddings),
        )
        for row, (mask, source) in enumerate(zip(own, sources, strict=True))
    ]


def decoder_arguments(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Run a model up to its decoder, and return the arguments of that call by their names.

    Args:
        model: The model.
        given: What its `forward` takes, see `normalise_inputs`.

    Raises:
        InputError: The decoder isn't called, or is handed something that `DecoderInputs` can't
            hold.
    """
    reached = _DecoderCalled()

    def stop(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        # The names of the arguments that stand first; a decoder is mostly called by name.
        names = inspect.signature(original).parameters
        reached.arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        raise reached

    # A forward hook would be seen, and its exception be raised, in every thread.
    with override_method(text_decoder(model), "forward", stop), torch.no_grad():
        try:
            model(**given)
        except _DecoderCalled as caught:
            if caught is not reached:
                raise
    if reached.arguments is None:
        raise InputError(f"{type(model).__name__} did not call its decoder.")
    check_known(model, reached.arguments)
    return reached.arguments


class _DecoderCalled(Exception):  # noqa: N818
    """The decoder was called."""

    arguments: dict[str, Any] | None = None


def check_known(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Refuse what a decoder would be handed beside what `DecoderInputs` hold.

    Raises:
        InputError: There is something, which is named.
    """
    unknown = [
        name
        for name, value in arguments.items()
        if value is not None
        and name not in USED | HARMLESS
        and not (name == "cache_position" and _counts_up(value))
    ]
    if unknown:
        raise InputError(
            f"{type(model).__name__} hands its decoder {', '.join(sorted(unknown))}, which fastvlm"
            " doesn't know and would have to leave out; it decodes no such prompt."
        )
    for name in CACHE_NAMES:
        check_empty(arguments.get(name))


def _counts_up(value: Any) -> bool:
    """Return whether a value is 0, 1, 2 ..., which says nothing new."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 1
        and bool((value == torch.arange(len(value), device=value.device)).all())
    )


def check_empty(cache: Any) -> None:
    """Refuse a cache of `transformers` that holds something.

    Raises:
        InputError: It does.
    """
    if cache is not None and (length := int(cache.get_seq_length())):
        raise InputError(
            f"The prompt goes on from {length} positions in a cache of transformers, which fastvlm"
            " can't take over; give it the whole prompt."
        )


def normalise_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs as `forward` takes them.

    Args:
        model: The model.
        inputs: See `capture_decoder_inputs`.

    Raises:
        InputError: They go on from a cache that holds something.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    for name in CACHE_NAMES:
        check_empty(given.pop(name, None))
    config: Any = model.config
    queries = getattr(config, "num_query_tokens", None)
    if queries and "input_ids" not in given and "inputs_embeds" not in given:
        # BLIP-2 describes an image without being asked, and its `generate` starts so.
        row = [config.image_token_id] * queries + [config.text_config.bos_token_id]
        pixels: Tensor = given["pixel_values"]
        given["input_ids"] = torch.tensor([row] * len(pixels), device=pixels.device)
    if config.is_encoder_decoder and given.keys().isdisjoint(REPLY_STARTS):
        # BART's `forward` would make a reply of the source; `generate` starts one.
        source: Tensor | None = next((given[name] for name in SOURCES if name in given), None)
        if source is not None:
            start = torch.full((len(source), 1), start_token(model), device=source.device)
            given["decoder_input_ids"] = start
    base: Any = model.base_model
    remembers = hasattr(base, "rope_deltas") and hasattr(base, "get_rope_index")
    if remembers and "position_ids" not in given:
        # Without them, Qwen2-VL's `forward` reads and writes what `generate` remembers on the model
        # from one step to the next, maybe in another thread.
        given["position_ids"] = three_axes(base, given)
    return given


def three_axes(base: Any, given: Mapping[str, Any]) -> Tensor:
    """Return the positions of a model with three axes, as its `generate` has them.

    Args:
        base: The model without its LM head.
        given: What its `forward` takes.

    Returns:
        Time, height and width: (3, batch, length).
    """
    tokens: Tensor | None = given.get("input_ids")
    shown = any(given.get(f"{kind}_grid_thw") is not None for kind in ("image", "video"))
    accepted = inspect.signature(base.get_rope_index).parameters
    # Releases differ in what tells images from text: their token types, or their tokens alone.
    told = "mm_token_type_ids" in given or "mm_token_type_ids" not in accepted
    if tokens is not None and shown and told:
        named = {name: given[name] for name in accepted if name in given}
        positions: Tensor = base.get_rope_index(**named)[0]
        return positions
    mask: Tensor | None = given.get("attention_mask")
    if mask is None or mask.dim() != 2:  # noqa: PLR2004  (batch, length)
        like: Tensor = given["inputs_embeds"][..., 0] if tokens is None else tokens
        mask = torch.ones_like(like)
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted.expand(3, -1, -1)


def row_masks(mask: Any, states: Tensor) -> Tensor:
    """Return which positions are a row's own, and not padding: (batch, length).

    Args:
        mask: 1 for a row's own positions and 0 for padding, (batch, length); None for no padding.
        states: What has these positions: (batch, length, width).

    Raises:
        InputError: The mask is of another shape, and so about more than padding.
    """
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if isinstance(mask, Tensor) and mask.shape == states.shape[:2]:
        return mask.to(states.device, torch.bool)
    other = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise InputError(
        f"An attention mask says which of {tuple(states.shape[:2])} tokens are padding; got"
        f" {other}. A model that masks in its own way can't be decoded here; if generate was asked"
        " for cache_implementation='static', leave that out."
    )


def is_padding_mask(mask: Any, states: Tensor) -> bool:
    """Return whether a mask says which of some states, (batch, length, width), are padding."""
    return isinstance(mask, Tensor) and mask.shape == states.shape[:2]


def check_no_gaps(own: Tensor) -> None:
    """Refuse padding between a row's own positions, where a decoder counts them itself.

    It would count the padding, too, as with PEFT's prompt tuning of a padded batch.

    Args:
        own: Which positions are a row's own: (batch, length).

    Raises:
        InputError: There is some.
    """
    starts = (own[:, 1:] & ~own[:, :-1]).sum(1) + own[:, 0]
    if bool((starts > 1).any()):
        raise InputError(
            "A row's padding stands between its positions, which the model would count; decode rows"
            " of different lengths one at a time."
        )


def row_positions(decoder: Any, positions: Tensor, row: int, mask: Tensor) -> Tensor | None:
    """Return where a row's positions are, (axes, length); None for 0, 1, 2 ...

    Args:
        decoder: The decoder, as `transformers` made it.
        positions: (batch or 1, length), or (3 or 4, batch or 1, length), of which the last three
            are time, height and width.
        row: The row.
        mask: Which positions are the row's own: (length,).

    Raises:
        InputError: A decoder with a table of positions was given others than 0, 1, 2 ..., or a
            reply's would not follow on the last.
    """
    row = min(row, positions.shape[-2] - 1)
    own = positions[..., row, :][..., mask.to(positions.device)]
    counted = torch.arange(own.shape[-1], device=own.device)
    if bool((own == counted).all()):
        return None
    if own.dim() == 1 and (not hasattr(decoder, "rotary_emb") or own[-1] != own.max()):
        raise InputError(
            "A prompt's positions count up from 0 without gaps; got"
            f" {', '.join(map(str, own[:8].tolist()))} ... Leave out position_ids."
        )
    return own[None] if own.dim() == 1 else own[-3:]
