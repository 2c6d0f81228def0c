"""Small models with random weights of every family, and inputs with images for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

import fastvlm.vision  # noqa: F401  transformers' FastVLM is then built with our encoder
from tests.models import IMAGE_SIZE, VISUAL_TOKENS, randomise, small_encoder_config

Inputs = dict[str, Tensor]
Family = tuple[PreTrainedModel, Callable[[int], Inputs]]
"""A model, and what makes inputs for a batch of so many rows."""

IMAGE, END, PAD, START = 96, 1, 0, 2
DEPTH = 4
ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large weights, so that random models don't just repeat one token.
    "initializer_range": 0.3,
    "vocab_size": 97,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": START,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 32,
    "vocab_size": 97,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": START,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": DEPTH,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "vocab_size": 97,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PATCHES = 16
"""Patches of an image, or of a tile of one."""


def finished(model: PreTrainedModel, gain: float = 3.0) -> PreTrainedModel:
    """Return a model in float64, with large weights outside a decoder of the rotary kind.

    Args:
        model: The model.
        gain: How large: what leaves a layer, against what entered.
    """
    torch.manual_seed(7)
    large = {id(part) for part in rotary_parts(model)}
    for part in model.children():
        enliven(part, large, gain)
    return model.double().eval()


def rotary_parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a rotary decoder and its LM head, whose configuration sets weights."""
    return [
        part
        for name, module in model.named_modules()
        if hasattr(module, "rotary_emb") or name == "lm_head"
        for part in module.modules()
    ]


@torch.no_grad()
def enliven(module: nn.Module, but: set[int], gain: float) -> None:
    """Give weights values that make a difference, and query tokens values at all."""
    for name, part in module.named_modules():
        if id(part) in but:
            continue
        if isinstance(part, nn.Conv2d | nn.Conv3d | nn.Linear):
            part.weight.normal_(std=gain * part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                part.bias.normal_(std=0.1)
        elif isinstance(part, nn.Embedding):
            # Where positions count for little, tied models repeat a token.
            places = name.endswith(("embed_positions", "relative_attention_bias"))
            part.weight.normal_(std=3.0 if places else 0.5)


def written(lengths: Sequence[int], visual: Sequence[int]) -> Inputs:
    """Return prompts of visual tokens and text of some lengths, padded on the left."""
    random = torch.Generator().manual_seed(3)
    rows = []
    for number, length in zip(visual, lengths, strict=True):
        text = torch.randint(3, IMAGE, (length,), generator=random).tolist()
        rows.append([text[0], *[IMAGE] * number, *text[1:]])
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        ),
    }


def lengths(rows: int) -> list[int]:
    """Return how long the text of each row is."""
    return [5, 9, 3, 7, 4, 11, 6, 8][:rows]


def images(*shape: int) -> Tensor:
    """Return random images."""
    random = torch.Generator().manual_seed(4)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def text(model_type: str, gain: float = 3.0, **options: Any) -> Family:
    """Return a model of text alone."""
    torch.manual_seed(5)
    shape = OPT if model_type == "opt" else {**ROTARY, "model_type": model_type}
    config = AutoConfig.for_model(**{**shape, **options})
    return finished(AutoModelForCausalLM.from_config(config), gain), lambda rows: written(
        lengths(rows), [0] * rows
    )


def llava() -> Family:
    """LLaVA-1.5: CLIP's patches, Llama."""
    torch.manual_seed(5)
    config = LlavaConfig(
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        text_config={**ROTARY, "model_type": "llama"},
        image_token_id=IMAGE,
    )
    return finished(LlavaForConditionalGeneration(config)), lambda rows: {
        **written(lengths(rows), [PATCHES] * rows),
        "pixel_values": images(rows, 3, 32, 32),
    }


def tiled(model: PreTrainedModel) -> Callable[[int], Inputs]:
    """Return what makes inputs of images in tiles, of different shapes."""

    def inputs(rows: int) -> Inputs:
        sizes = torch.tensor([[40, 64], [64, 30], [32, 64], [50, 35]])[:rows]
        shown = {"pixel_values": images(rows, 3, 3, 32, 32), "image_sizes": sizes}
        with torch.no_grad():
            features = model.get_image_features(**shown).pooler_output
        return {**written(lengths(rows), list(map(len, features))), **shown}

    return inputs


def llava_next() -> Family:
    """LLaVA-NeXT: tiles of CLIP's patches, packed; Mistral."""
    torch.manual_seed(5)
    config = LlavaNextConfig(
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        text_config={**ROTARY, "model_type": "mistral", "sliding_window": None},
        image_token_id=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    model = finished(LlavaNextForConditionalGeneration(config))
    return model, tiled(model)


def llava_onevision() -> Family:
    """LLaVA-OneVision: tiles of SigLIP's patches, packed; Qwen2."""
    torch.manual_seed(5)
    config = LlavaOnevisionConfig(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**ROTARY, "model_type": "qwen2"},
        image_token_id=IMAGE,
        video_token_id=95,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    model = finished(LlavaOnevisionForConditionalGeneration(config))
    return model, tiled(model)


def fast_vlm() -> Family:
    """FastVLM: FastViTHD, Qwen2."""
    torch.manual_seed(5)
    config = FastVlmConfig(
        vision_config=small_encoder_config().to_dict(),
        text_config={**ROTARY, "model_type": "qwen2"},
        image_token_id=IMAGE,
        image_seq_length=VISUAL_TOKENS,
    )
    model = finished(FastVlmForConditionalGeneration(config))
    randomise(model.model.vision_tower, shift=0.1)
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    return model, lambda rows: {
        **written(lengths(rows), [VISUAL_TOKENS] * rows),
        "pixel_values": images(rows, 3, IMAGE_SIZE, IMAGE_SIZE).sigmoid(),
    }


def gridded(rows: int) -> Inputs:
    """Return inputs of images in grids of different shapes, in patches of 8 by 8 by 2."""
    grids = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 2, 4], [1, 6, 6]])[:rows]
    asked = written(lengths(rows), (grids.prod(-1) // 4).tolist())
    return {
        **asked,
        "mm_token_type_ids": (asked["input_ids"] == IMAGE).int(),
        "pixel_values": images(int(grids.prod(-1).sum()), 3 * 2 * 8 * 8),
        "image_grid_thw": grids,
    }


GRIDDED: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": 95,
    "vision_start_token_id": 94,
    "vision_end_token_id": 93,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def qwen2_5_vl() -> Family:
    """Qwen2.5-VL: positions in three axes."""
    torch.manual_seed(5)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        text_config={**ROTARY, "rope_parameters": MROPE},
        **GRIDDED,
    )
    return finished(Qwen2_5_VLForConditionalGeneration(config)), gridded


def qwen2_vl() -> Family:
    """Qwen2-VL: positions in three axes."""
    torch.manual_seed(5)
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 8,
        },
        text_config={**ROTARY, "rope_parameters": MROPE},
        **GRIDDED,
    )
    return finished(Qwen2VLForConditionalGeneration(config)), gridded


def idefics(model: PreTrainedModel) -> Family:
    """Idefics3 and SmolVLM: an image's patches, shuffled to a quarter of them."""
    return finished(model), lambda rows: {
        **written(lengths(rows), [PATCHES // 4] * rows),
        "pixel_values": images(rows, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(rows, 1, 32, 32, dtype=torch.bool),
    }


def idefics3() -> Family:
    """Idefics3: Llama."""
    torch.manual_seed(5)
    config = Idefics3Config(
        vision_config=TOWER,
        text_config={**ROTARY, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return idefics(Idefics3ForConditionalGeneration(config))


def smolvlm() -> Family:
    """SmolVLM: Llama."""
    torch.manual_seed(5)
    config = SmolVLMConfig(
        vision_config=TOWER,
        text_config={**ROTARY, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return idefics(SmolVLMForConditionalGeneration(config))


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


def replies(model: PreTrainedModel, inputs: Inputs, limit: int, **options: Any) -> list[list[int]]:
    """Return transformers' own greedy replies, each up to its end token."""
    out = model.generate(**inputs, max_new_tokens=limit, do_sample=False, **options)
    if model.get_decoder().config.is_encoder_decoder:
        start = 1
    else:
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    found = out[:, start:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in found]
