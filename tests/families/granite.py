"""Granite's models with images, in packed tiles."""

from __future__ import annotations

import torch
import transformers
from transformers import (
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from tests.families.parts import (
    IMAGE,
    PAD,
    PATCHES,
    ROTARY,
    SIGLIP,
    TOWER,
    Inputs,
    MakeInputs,
    NewerFamily,
    images,
    lively,
    prompts,
    shared_out,
)
from tests.families.text_only import GRANITE

AROUND = 80
PINPOINTS = [[32, 64], [64, 32]]
SIZES = [[40, 64], [64, 30], [32, 64], [50, 35]]


def in_packed_tiles(model: PreTrainedModel) -> MakeInputs:
    """Return what makes inputs of images in tiles, of different shapes."""

    def inputs(rows: int, images_per_row: int = 1) -> Inputs:
        count = rows * images_per_row
        if not count:
            return prompts([[]] * rows)
        shown = {
            "pixel_values": images(count, 3, 3, 32, 32),
            "image_sizes": torch.tensor(SIZES * images_per_row)[:count],
        }
        with torch.no_grad():
            found = model.get_image_features(**shown)
        # Granite 4 has features for several layers.
        several = getattr(found, "deepstack_features", None)
        features = several[0][1] if several else found.pooler_output
        blocks = [[IMAGE] * len(image) for image in features]
        return {**prompts(shared_out(blocks, rows)), **shown}

    return inputs


def granite_vision() -> NewerFamily:
    """Granite Vision 3: tiles of SigLIP's patches from several layers, packed; Granite."""
    torch.manual_seed(5)
    config = LlavaNextConfig(
        vision_config=SIGLIP,
        text_config={**ROTARY, **GRANITE, "model_type": "granite"},
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = lively(LlavaNextForConditionalGeneration(config))
    return model, in_packed_tiles(model)


def granite4_vision() -> NewerFamily:
    """Granite 4 Vision: features of tiles are added before several of the decoder's layers."""
    torch.manual_seed(5)
    config = Granite4VisionConfig(
        vision_config={**SIGLIP, "hidden_size": 64},  # the projector has a head for every 64
        text_config={**ROTARY, **GRANITE, "model_type": "granite4_vision_text"},
        qformer_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 64,
            "encoder_hidden_size": 64,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "intermediate_size": 32,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 32,
            "vocab_size": 20,
            "use_qformer_text_input": False,
        },
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 1], [-1, 0]],
        spatial_target_layers=[0, 1, 2, 3],
        tie_word_embeddings=True,
    )
    model = lively(Granite4VisionForConditionalGeneration(config))
    return model, in_packed_tiles(model)


def granite_docling() -> NewerFamily:
    """Granite for Docling: tiles shuffled to a quarter; features for several layers."""
    torch.manual_seed(5)
    config = transformers.GraniteDoclingConfig(
        vision_config={
            **TOWER,
            "out_hidden_size": 32,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**ROTARY, **GRANITE},
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    model = lively(transformers.GraniteDoclingForConditionalGeneration(config))
    return model, in_some_tiles


def in_some_tiles(rows: int, images_per_row: int = 1) -> Inputs:
    """Return inputs of images in different numbers of tiles, each between two tokens."""
    numbers = [[2, 1, 3, 2][image % 4] for image in range(rows * images_per_row)]
    blocks = [[*[AROUND, *[IMAGE] * (PATCHES // 4)] * tiles, AROUND] for tiles in numbers]
    made = prompts(shared_out(blocks, rows))
    if not images_per_row:
        return made
    each = torch.tensor(numbers).view(rows, images_per_row).sum(dim=1)
    there = torch.arange(int(each.max())) < each[:, None]
    return {
        **made,
        "pixel_values": images(*there.shape, 3, 32, 32),
        "pixel_attention_mask": there,
    }


NEWER_GRANITE = {
    "granite-vision": granite_vision,
    "granite4-vision": granite4_vision,
    "granite-docling": granite_docling,
}
