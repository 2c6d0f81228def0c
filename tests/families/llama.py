"""Llama's models with images: Llama 3.2 and Llama 4."""

from __future__ import annotations

import torch
from transformers import (
    Llama4Config,
    Llama4ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
)
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from tests.families.parts import (
    IMAGE,
    PATCHES,
    ROTARY,
    TOWER,
    Inputs,
    NewerFamily,
    images,
    lively,
    of_one_size,
    prompts,
)
from tests.families.text_only import LLAMA4

TILES = 4
"""How many tiles of an image Llama 3.2 sees at most."""
SEEN = [[1, 1], [2, 2], [6, 4], [4, 3]]
"""Shapes in which images are tiled, by their numbers among those that are possible, and tiles."""
TURNS = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
STARTS, ENDS, SEPARATES, WHOLE = 94, 93, 92, 91


def mllama() -> NewerFamily:
    """Llama 3.2 Vision: some layers attend to tiles of images, and to nothing else."""
    torch.manual_seed(5)
    config = MllamaConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "max_num_tiles": TILES,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 48,
        },
        # The image's token is the first of those that can be read but not written.
        text_config={
            **ROTARY,
            "vocab_size": IMAGE,
            "cross_attention_layers": [1, 3],
            "rope_parameters": TURNS,
        },
        image_token_index=IMAGE,
    )
    return lively(MllamaForConditionalGeneration(config)), beside_text


def beside_text(rows: int, images_per_row: int = 1) -> Inputs:
    """Return inputs of images that some layers attend to, each from where its token stands."""
    made = prompts([[[IMAGE]] * images_per_row] * rows)
    if not images_per_row:
        return made
    numbers, tiles = torch.tensor(SEEN * images_per_row)[: rows * images_per_row].T
    tiles = tiles.view(rows, images_per_row)
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(row, IMAGE) for row in made["input_ids"].tolist()],
        num_tiles=tiles.tolist(),
        max_num_tiles=TILES,
        length=made["input_ids"].shape[1],
    )
    there = (torch.arange(TILES) < tiles[..., None]).long()
    pixels = images(rows, images_per_row, TILES, 3, 16, 16)
    return {
        **made,
        "pixel_values": pixels * there[..., None, None, None],
        "aspect_ratio_ids": numbers.view(rows, images_per_row),
        "aspect_ratio_mask": there,
        "cross_attention_mask": torch.as_tensor(mask),
    }


def llama4() -> NewerFamily:
    """Llama 4: attention in chunks, layers without positions, a mixture of experts in turn."""
    torch.manual_seed(5)
    config = Llama4Config(
        vision_config={
            **TOWER,
            "intermediate_size": 64,  # of four patches, side by side
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        text_config={**ROTARY, **LLAMA4},
        image_token_index=IMAGE,
        boi_token_index=STARTS,
        eoi_token_index=ENDS,
    )
    tile = [IMAGE] * (PATCHES // 4)
    block = [STARTS, *tile, SEPARATES, WHOLE, *tile, ENDS]
    return lively(Llama4ForConditionalGeneration(config)), of_one_size(block, tiles=2)


NEWER_LLAMA = {"llama4": llama4, "mllama": mllama}
