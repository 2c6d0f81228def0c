"""Kosmos-2.5: patches of a page, resampled to a few tokens."""

from __future__ import annotations

import torch
from transformers import Kosmos2_5Config, Kosmos2_5ForConditionalGeneration

from tests.families.parts import (
    DEPTH,
    END,
    IMAGE,
    PAD,
    START,
    Inputs,
    NewerFamily,
    images,
    lively,
    prompts,
)

LATENT = 5
"""Tokens of an image."""
SIDE = 4
"""Patches on each side of an image."""
STARTS, ENDS = 94, 93


def kosmos2_5() -> NewerFamily:
    """Kosmos-2.5: Pix2Struct's patches with their places, a decoder with sinusoidal positions."""
    torch.manual_seed(5)
    config = Kosmos2_5Config(
        vision_config={
            "hidden_size": 16,
            "patch_embed_hidden_size": 3 * 8 * 8,
            "intermediate_size": 32,
            "head_dim": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_num_patches": 4097,
        },
        text_config={
            "vocab_size": 97,
            "max_position_embeddings": 256,
            "embed_dim": 32,
            "layers": DEPTH,
            "ffn_dim": 48,
            "attention_heads": 4,
            "pad_token_id": PAD,
            "bos_token_id": START,
            "eos_token_id": END,
        },
        latent_query_num=LATENT,
    )
    model = lively(Kosmos2_5ForConditionalGeneration(config), gain=6.0, shift=0.1)
    with torch.no_grad():
        # Where a reply had padding, transformers would not count its position.
        model.get_output_embeddings().weight[PAD] = 0.0
    return model, of_pages


def of_pages(rows: int, images_per_row: int = 1) -> Inputs:
    """Return inputs of images in patches, each after its row and its column.

    Rows are of one length: the positions of a reply would count padding.
    """
    made = prompts([[[STARTS, *[IMAGE] * LATENT, ENDS]] * images_per_row] * rows, even=True)
    if not images_per_row:
        return made
    tokens = made["input_ids"]
    around = (tokens == STARTS) | (tokens == ENDS)
    count = SIDE * SIDE
    places = torch.stack([torch.arange(count) // SIDE + 1, torch.arange(count) % SIDE + 1], -1)
    patches = images(rows * images_per_row, count, 3 * 8 * 8)
    return {
        **made,
        "flattened_patches": torch.cat([places.expand(len(patches), -1, -1), patches], dim=-1),
        "image_embeds_position_mask": (tokens == IMAGE).long() - around.long(),
    }


NEWER_KOSMOS = {"kosmos-2.5": kosmos2_5}
