"""Models whose encoder reads the prompt, and whose decoder writes the reply."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedModel,
)

from tests.families.parts import (
    DEPTH,
    END,
    IMAGE,
    PAD,
    ROTARY,
    START,
    T5,
    Inputs,
    MakeInputs,
    NewerFamily,
    lively,
    of_one_size,
)
from tests.families.text_only import GEMMA, in_float32, words

BART: dict[str, Any] = {
    "model_type": "bart",
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": DEPTH,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "vocab_size": 97,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
    "decoder_start_token_id": END,
    "forced_eos_token_id": None,
}
SEEN = 17
"""Florence-2's tokens of an image: each place of the last map, and all of them together."""


def padded_on_the_right(inputs: MakeInputs) -> MakeInputs:
    """Return what makes the same inputs with padding where an encoder has it."""

    def turned(rows: int, images_per_row: int = 1) -> Inputs:
        made = inputs(rows, images_per_row)
        order = (1 - made["attention_mask"]).argsort(dim=1, stable=True)
        both = {name: made[name].gather(1, order) for name in ("input_ids", "attention_mask")}
        return {**made, **both}

    return turned


@torch.no_grad()
def lively_bart(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with BART's layers, whose replies vary."""
    lively(model, gain=4.0, shift=0.1, tied=1.0)
    for name, weight in model.named_parameters():
        if name.endswith("fc2.weight"):
            # Activations are positive on the whole: what they have in common would decide.
            weight.sub_(weight.mean(dim=1, keepdim=True))
    return model


def encoder_decoder(
    finish: Callable[[PreTrainedModel], PreTrainedModel] = lively, **options: Any
) -> NewerFamily:
    """Return a model of text alone that has an encoder."""
    torch.manual_seed(5)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**options))
    return finish(model), padded_on_the_right(words)


def t5gemma() -> NewerFamily:
    """T5Gemma: an encoder and a decoder of Gemma 2's layers."""
    part = {**ROTARY, **GEMMA}
    return encoder_decoder(
        partial(lively, shift=2.0),
        model_type="t5gemma",
        encoder={**part, "num_hidden_layers": 2},
        decoder=part,
        vocab_size=ROTARY["vocab_size"],
        decoder_start_token_id=START,
    )


def florence2() -> NewerFamily:
    """Florence-2: DaViT's maps before the text of BART's encoder."""
    torch.manual_seed(5)
    config = Florence2Config(
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [8, 16],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 4,
            "drop_path_rate": 0.0,
            "projection_dim": 32,
        },
        text_config=BART,
        image_token_id=IMAGE,
        **{name: BART[name] for name in BART if name.endswith("_token_id")},
    )
    model = lively_bart(Florence2ForConditionalGeneration(config))
    return model, padded_on_the_right(of_one_size([IMAGE] * SEEN))


NEWER_READ_FIRST: dict[str, Callable[[], NewerFamily]] = {
    "bart": lambda: encoder_decoder(lively_bart, **BART),
    "mt5": lambda: encoder_decoder(partial(lively, gain=2.0), **{**T5, "model_type": "mt5"}),
    "t5gemma": lambda: in_float32(t5gemma()),
}
NEWER_READ_FIRST_WITH_IMAGES = {"florence2": florence2}
