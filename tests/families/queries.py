"""BLIP-2 and InstructBLIP: query tokens, and language models of every kind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from tests.families.parts import IMAGE, TOWER, Family, finished, images, lengths, written

QUERIES = 3


def blip2(language: dict[str, Any], **options: Any) -> Family:
    """BLIP-2: a Q-Former's query tokens before the text of OPT or of FlanT5's encoder."""
    torch.manual_seed(5)
    config = Blip2Config(
        vision_config=TOWER,
        qformer_config={
            **{name: TOWER[name] for name in list(TOWER)[:4]},
            "encoder_hidden_size": 16,
            "vocab_size": 20,
        },
        text_config={**language, **options},
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    model = finished(Blip2ForConditionalGeneration(config))
    model.query_tokens.data.normal_()
    return model, lambda rows: {
        **written(lengths(rows), [QUERIES] * rows),
        "pixel_values": images(rows, 3, 32, 32),
    }


def instructblip(language: dict[str, Any], gain: float = 3.0) -> Family:
    """InstructBLIP: as BLIP-2, but its Q-Former reads the question."""
    torch.manual_seed(5)
    config = InstructBlipConfig(
        vision_config=TOWER,
        qformer_config={
            **{name: TOWER[name] for name in list(TOWER)[:4]},
            "encoder_hidden_size": 16,
            "vocab_size": 20,
        },
        text_config=language,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    model = finished(InstructBlipForConditionalGeneration(config), gain)
    model.query_tokens.data.normal_()
    return model, lambda rows: {
        **written(lengths(rows), [QUERIES] * rows),
        "pixel_values": images(rows, 3, 32, 32),
        "qformer_input_ids": torch.arange(rows * 4).view(rows, 4) % 19 + 1,
        "qformer_attention_mask": torch.ones(rows, 4, dtype=torch.long),
    }
