"""The layouts of FastVLM checkpoints, and the names that each gives weights and settings.

Apple's: `llava_qwen2`, with the encoder of MobileCLIP inside. `transformers`': `fast_vlm`, with
timm's `fastvit_mci3` as vision tower. Both are read as `FastVlmForConditionalGeneration` around our
own FastViTHD, which is the third layout: `fast_vlm` with a `fastvithd` tower.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import FastVlmConfig, Qwen2Config

from fastvlm.checkpoints.keys import from_apple, from_timm, to_timm
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.vision.configuration import REDUCTION, FastViTHDConfig

IMAGE_TOKEN = "<image>"
VISION_TOWER_PREFIX = "model.vision_tower."
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Apple's conversation (`qwen_2`): ChatML, an image as a line of its own before the question."""

_APPLE_VISION_PREFIX = "model.vision_tower.vision_tower.model."
_TIMM_VISION_PREFIX = "model.vision_tower.timm_model."
_TIMM_ARCHITECTURE = "fastvit_mci3"


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout other than fastvlm's own.

    Args:
        rename: Returns fastvlm's name of a weight, or None for one that is not used.
        configure: Returns fastvlm's configuration, given the layout's and the encoder's form.
    """

    rename: Callable[[str], str | None]
    configure: Callable[[dict[str, Any], str], FastVlmConfig]

    def convert(
        self, config: dict[str, Any], weights: dict[str, Tensor]
    ) -> tuple[FastVlmConfig, dict[str, Tensor]]:
        """Return fastvlm's configuration, and the weights under fastvlm's names."""
        renamed = {}
        for name, weight in weights.items():
            ours = self.rename(name)
            if ours is not None:
                renamed[ours] = weight
        return self.configure(config, form_of(renamed)), renamed


def recognise(config: dict[str, Any]) -> Layout | None:
    """Return the layout of a `config.json`; None for one that `transformers` loads itself."""
    if config.get("model_type") in ("llava_qwen2", "llava_qwen"):
        return APPLE_LAYOUT
    vision = config.get("vision_config") or {}
    if config.get("model_type") == "fast_vlm" and vision.get("model_type") == "timm_wrapper":
        return TRANSFORMERS_LAYOUT
    return None


def form_of(weights: dict[str, Tensor]) -> str:
    """Return the form of an encoder, given its weights under fastvlm's names."""
    return (
        "reparameterized"
        if f"{VISION_TOWER_PREFIX}stem.0.reparam.weight" in weights
        else "training"
    )


def _apple_name(name: str) -> str | None:
    if name.startswith(_APPLE_VISION_PREFIX):
        ours = from_apple(name.removeprefix(_APPLE_VISION_PREFIX))
        return None if ours is None else VISION_TOWER_PREFIX + ours
    if match := re.fullmatch(r"model\.mm_projector\.([02])\.(weight|bias)", name):
        return f"model.multi_modal_projector.linear_{1 + int(match[1]) // 2}.{match[2]}"
    return re.sub(r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1.", name)


def _timm_name(name: str) -> str | None:
    if not name.startswith(_TIMM_VISION_PREFIX):
        return name
    ours = from_timm(name.removeprefix(_TIMM_VISION_PREFIX))
    return None if ours is None else VISION_TOWER_PREFIX + ours


def transformers_name(name: str, form: str) -> str:
    """Return the name of one of fastvlm's weights in `transformers`' layout."""
    if not name.startswith(VISION_TOWER_PREFIX):
        return name
    return _TIMM_VISION_PREFIX + to_timm(name.removeprefix(VISION_TOWER_PREFIX), form)


def _apple_config(config: dict[str, Any], form: str) -> FastVlmConfig:
    tower = str(config.get("mm_vision_tower"))
    size = re.fullmatch(r"mobileclip_l_(\d+)", tower.rsplit("/", 1)[-1])
    if size is None:
        raise InputError(
            f"The vision tower of this checkpoint is {tower!r}; fastvlm reads Apple's"
            " mobileclip_l_SIZE (FastViTHD)."
        )
    projector = config.get("mm_projector_type")
    if projector != "mlp2x_gelu":
        raise InputError(
            f"The projector of this checkpoint is {projector!r}; fastvlm reads mlp2x_gelu."
        )
    known = Qwen2Config().to_dict().keys() - {"model_type", "architectures"}
    text = {name: value for name, value in config.items() if name in known}
    # Names that transformers had for them when Apple's checkpoints were written.
    text |= {name: config[name] for name in ("rope_theta", "rope_scaling") if name in config}
    return _configured(text | {"model_type": "qwen2"}, int(size[1]), form)


def _transformers_config(config: dict[str, Any], form: str) -> FastVlmConfig:
    vision = config["vision_config"]
    if vision.get("architecture") != _TIMM_ARCHITECTURE:
        raise InputError(
            f"The vision tower of this checkpoint is timm's {vision.get('architecture')!r};"
            f" fastvlm reads {_TIMM_ARCHITECTURE} (FastViTHD)."
        )
    length = int(config.get("image_seq_length", 256))
    side = round(length**0.5)
    if side * side != length:
        raise CheckpointError(f"image_seq_length is {length}, which is not a square number.")
    text = dict(config["text_config"])
    # Written in the one place or in the other, by different releases.
    text["tie_word_embeddings"] = bool(
        config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    )
    made = _configured(text, side * REDUCTION, form)
    made.image_token_index = int(config.get("image_token_index", made.image_token_index))
    return made


def _configured(text: dict[str, Any], size: int, form: str) -> FastVlmConfig:
    if size % REDUCTION:
        raise InputError(f"The encoder's image size is {size}, no multiple of {REDUCTION}.")
    vision = FastViTHDConfig.variant("fastvithd", image_size=size, form=form)
    return FastVlmConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_seq_length=(size // REDUCTION) ** 2,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )


APPLE_LAYOUT = Layout(_apple_name, _apple_config)
TRANSFORMERS_LAYOUT = Layout(_timm_name, _transformers_config)


def transformers_vision_config(config: FastViTHDConfig) -> dict[str, Any]:
    """Return the vision tower's configuration in `transformers`' layout.

    Raises:
        InputError: The encoder is not the variant that timm has, or it is fused.
    """
    released = FastViTHDConfig.variant("fastvithd")
    if (config.depths, config.widths, config.mlp_ratio) != (
        released.depths,
        released.widths,
        released.mlp_ratio,
    ):
        raise InputError(
            f"transformers' layout has timm's {_TIMM_ARCHITECTURE} as encoder, of depths"
            f" {released.depths} and widths {released.widths}; this one has {config.depths} and"
            f" {config.widths}."
        )
    if config.form == "fused":
        raise InputError(
            "This encoder's BatchNorms and layer scales are folded for good, and transformers'"
            " layout has a place for each; convert from the checkpoint that it was made from."
        )
    return {
        "model_type": "timm_wrapper",
        "architecture": _TIMM_ARCHITECTURE,
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": config.hidden_size,
        "image_size": config.image_size,
        "initializer_range": config.initializer_range,
        "label_names": ["LABEL_0", "LABEL_1"],
        "model_args": {"inference_mode": config.form == "reparameterized"},
        "num_classes": 2,
    }
