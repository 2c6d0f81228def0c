"""Small models with random weights of every family, and inputs with images for them."""

from __future__ import annotations

from collections.abc import Callable

from tests.families.gemma import NEWER_GEMMA
from tests.families.glm import NEWER_GLM
from tests.families.granite import NEWER_GRANITE
from tests.families.idefics import idefics3, smolvlm
from tests.families.kosmos import NEWER_KOSMOS
from tests.families.llama import NEWER_LLAMA
from tests.families.llava import fast_vlm, llava, llava_next, llava_onevision
from tests.families.parts import (
    DEPTH,
    END,
    IMAGE,
    OPT,
    PAD,
    PATCHES,
    ROTARY,
    START,
    T5,
    TOWER,
    Family,
    Inputs,
    NewerFamily,
    finished,
    replies,
)
from tests.families.phi import NEWER_PHI
from tests.families.queries import QUERIES, blip2, instructblip
from tests.families.qwen import NEWER_QWEN, qwen2_5_vl, qwen2_vl
from tests.families.read_first import NEWER_READ_FIRST, NEWER_READ_FIRST_WITH_IMAGES
from tests.families.releases import released
from tests.families.text_only import NEWER_TEXT, text
from tests.families.tiles import NEWER_TILES

__all__ = [
    "DEPTH",
    "END",
    "FAMILIES",
    "IMAGE",
    "NEWER",
    "NEWER_WITH_IMAGES",
    "OPT",
    "PAD",
    "PATCHES",
    "QUERIES",
    "ROTARY",
    "START",
    "T5",
    "TOWER",
    "Family",
    "Inputs",
    "NewerFamily",
    "finished",
    "replies",
    "text",
]

FAMILIES: dict[str, Callable[[], Family]] = {
    "llama": lambda: text("llama"),
    "qwen3": lambda: text("qwen3", head_dim=12),
    "opt-350m": lambda: text(
        "opt",
        gain=1.0,
        word_embed_proj_dim=24,
        do_layer_norm_before=False,
        tie_word_embeddings=False,
    ),
    "llava": llava,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "fast-vlm": fast_vlm,
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "blip2-opt": lambda: blip2(OPT),
    "blip2-t5": lambda: blip2(T5),
    "blip2-t5-tied": lambda: blip2(T5, feed_forward_proj="relu", tie_word_embeddings=True),
    "instructblip-opt": lambda: instructblip(OPT),
    "instructblip-t5": lambda: instructblip(T5, gain=2.5),
    "instructblip-vicuna": lambda: instructblip({**ROTARY, "model_type": "llama"}),
}
NEWER_WITH_IMAGES = released(
    {
        **NEWER_GEMMA,
        **NEWER_GLM,
        **NEWER_GRANITE,
        **NEWER_KOSMOS,
        **NEWER_LLAMA,
        **NEWER_PHI,
        **NEWER_QWEN,
        **NEWER_READ_FIRST_WITH_IMAGES,
        **NEWER_TILES,
    }
)
NEWER: dict[str, Callable[[], NewerFamily]] = {
    **NEWER_TEXT,
    **NEWER_READ_FIRST,
    **NEWER_WITH_IMAGES,
}
"""Families whose inputs have any number of images in a row; those of text alone are shown none."""
