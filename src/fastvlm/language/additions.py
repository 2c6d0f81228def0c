"""What some families hand their decoder beside embeddings, made a part of each row's prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastvlm.functional.errors import InputError

INJECTED = {
    "visual_pos_masks": ("deepstack_visual_embeds", 0),
    "vision_mask": ("deepstack_features", -1),
}
"""Masks of the positions that states are added to: by what name the states come, and after which
layer the first of them are added, as Qwen3-VL and Granite 4 Vision have it."""
IMAGE_EMBEDDINGS = ("image_embeds", "image_embeds_position_mask")
"""Image features that Kosmos-2.5's decoder puts in itself, and the positions of them."""
CROSS_ATTENTION = (
    "cross_attention_states",
    "cross_attention_mask",
    "full_text_row_masked_out_mask",
)
"""What Mllama's cross-attention layers attend to, and which of it each position sees."""
ENCODED_INSIDE = (
    "image_pixel_values",
    "image_sizes",
    "image_attention_mask",
    "audio_input_features",
    "audio_embed_sizes",
    "audio_attention_mask",
)
"""What Phi-4 Multimodal's decoder encodes itself."""
ADDITIONS = frozenset(
    {
        *INJECTED,
        *(name for name, _ in INJECTED.values()),
        *IMAGE_EMBEDDINGS,
        *CROSS_ATTENTION,
        *ENCODED_INSIDE,
    }
)
"""All arguments of decoders that are read here."""


def with_images(decoder: Any, handed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a decoder's arguments with the images that it would put in itself.

    Args:
        decoder: The decoder, as `transformers` made it.
        handed: Its arguments.

    Raises:
        InputError: It is handed images as no decoder takes them that is known.
    """
    found = dict(handed)
    encoded = {name: found.pop(name) for name in ENCODED_INSIDE if name in found}
    if hasattr(decoder, "embed_tokens_extend") and found.get("input_ids") is not None:
        with torch.no_grad():
            tokens = found["input_ids"]
            found["inputs_embeds"] = decoder.embed_tokens_extend(
                tokens, decoder.embed_tokens(tokens), **encoded
            )
        return found
    if any(value is not None for value in encoded.values()):
        raise InputError(f"{type(decoder).__name__} is handed images that it can't encode.")
    features, places = (found.pop(name, None) for name in IMAGE_EMBEDDINGS)
    if features is None or places is None:
        return found
    # The tokens around an image, -1, have positions of its kind, but no features.
    shown = places != 0
    with torch.no_grad():
        given: Tensor | None = found.get("inputs_embeds")
        embed = decoder.get_input_embeddings()
        embeddings = (embed(found["input_ids"]) if given is None else given).clone()
        embeddings[places == 1] = features.to(embeddings).reshape(-1, features.shape[-1])
        # The embedding of images' positions, in the place of the text's.
        text, image = decoder.segment_emb.weight[:2]
        found["inputs_embeds"] = embeddings
        found["vision_mask"] = shown
        found["deepstack_features"] = {0: (image - text).expand(int(shown.sum()), -1)}
    return found


def row_source(
    handed: Mapping[str, Any], row: int, mask: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return what a row's cross-attention layers attend to, and which of it each position sees.

    Args:
        handed: The decoder's arguments.
        row: The row.
        mask: Which positions are the row's own: (length,).

    Returns:
        (source, d_model) and (own, source), see `DecoderInputs.encoder_states` and
        `source_visible`; None for no source.

    Raises:
        InputError: There is a source, but no mask of it.
    """
    states, added, sees = (handed.get(name) for name in CROSS_ATTENTION)
    if states is None:
        return None, None
    if added is None or sees is None:
        raise InputError(
            "An image is attended to by a mask: give generate the cross_attention_mask of the"
            " processor."
        )
    own = states.reshape(len(added), -1, states.shape[-1])[row]
    seen = (added[row, 0] == 0) & (sees[row, 0] != 0)
    return own, seen[mask.to(seen.device)]


def row_injections(
    handed: Mapping[str, Any], row: int, mask: Tensor, embeddings: Tensor
) -> dict[int, Tensor]:
    """Return what is added to a row's states after each layer, see `DecoderInputs.injections`.

    Args:
        handed: The decoder's arguments.
        row: The row.
        mask: Which positions are the row's own: (length,).
        embeddings: Of all rows: (batch, length, d_model).
    """
    found: dict[int, Tensor] = {}
    for name, (source, first) in INJECTED.items():
        given = handed.get(source)
        if given is None:
            continue
        if handed.get(name) is None:
            raise InputError(f"A decoder is handed {source}, but no {name} for where they go.")
        shown: Tensor = handed[name].to(embeddings.device)
        shown = shown if shown.dim() == 2 else shown[..., 0]  # noqa: PLR2004 (batch, length)
        numbered = given.items() if isinstance(given, Mapping) else enumerate(given)
        for number, states in numbered:
            whole = torch.zeros_like(embeddings)
            whole[shown] = states.to(embeddings)
            found[number + first] = whole[row][mask]
    return found
