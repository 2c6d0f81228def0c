"""Vision-language models of full size to be timed: their configurations, with random weights.

Time doesn't depend on what the weights are. Models with the same decoder share one, so that all fit
into the memory at a time and can be measured in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    ConvNextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from fastvlm.functional.placement import moved
from fastvlm.language import split_decoder
from fastvlm.language.packed import PACKED_BYTES, pack_decoder
from fastvlm.vision import FastViTHD, FastViTHDConfig
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.images import count_parts

TEXT_BEFORE, TEXT_AFTER = 14, 16
"""Tokens of the prompt around the image: ChatML, a system prompt and a short question."""
DECODERS: dict[str, dict[str, Any]] = {
    "0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "1.5B": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
"""Qwen2-0.5B and Qwen2-1.5B, the decoders of FastVLM-0.5B and FastVLM-1.5B."""


SIZES = ((256, 1), (512, 1), (768, 1), (1024, 1), (1152, 1), (1536, 1), (2048, 2))
"""Sides in pixels, and the tiles a side that they are shown in."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A model and an image of one size, ready to be timed.

    Args:
        name: The model.
        software: Whose code runs it: `fastvlm` or `transformers`.
        side: Side in pixels of the image that is shown.
        pixels: Shape of what the encoder takes.
        visual_tokens: Tokens that the image becomes.
        vision: The encoder.
        projector: The projector.
        decoder: The language model, head included.
        features: Pixels to (visual tokens, d_model): encoder and projector.
        logits: Embeddings, (1, length, d_model), to the last position's logits.
    """

    name: str
    software: str
    side: int
    pixels: tuple[int, ...]
    visual_tokens: int
    vision: nn.Module
    projector: nn.Module
    decoder: PreTrainedModel
    features: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]

    @property
    def last_layer(self) -> nn.Module:
        """The language model's last layer."""
        return self.decoder.get_decoder().layers[-1]


class Contenders:
    """Builds models when they are asked for, and keeps them.

    Args:
        device: Where to; `meta` computes nothing, and serves to count.
        dtype: The precision.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.decoders: dict[str, PreTrainedModel] = {}

    def all(self) -> list[tuple[str, Callable[[], Contender]]]:
        """Return the name of each contender, and what builds it."""
        fast = [
            (f"FastVLM-{decoder} {side}", partial(self.fastvlm, decoder, side // tiles, tiles))
            for decoder in DECODERS
            for side, tiles in SIZES
        ]
        return [
            *fast,
            ("LLaVA-OneVision-0.5B 1152", self.llava_onevision),
            ("LLaVA-1.5 with 0.5B 336", self.llava),
            ("ConvNeXt-L with 0.5B 512", partial(self.convnext, 512)),
            ("ConvNeXt-L with 0.5B 1024", partial(self.convnext, 1024)),
        ]

    def decoder(self, name: str) -> PreTrainedModel:
        """Return one of `DECODERS`, head included."""
        if name not in self.decoders:
            made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**DECODERS[name]))
            self.decoders[name] = self.placed(made)
        return self.decoders[name]

    def packed_decoder(self, name: str) -> PreTrainedModel:
        """Return one of `DECODERS` as `fastvlm.load` holds it, with the weights of a checkpoint.

        Those are stored in 16 bits. It is another one than the peers', which are to run as they do.
        """
        key = f"{name}, packed"
        if key not in self.decoders:
            made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**DECODERS[name]))
            self.decoders[key] = self.placed(moved(made, torch.bfloat16))
            if self.device == "cpu":
                pack_decoder(self.decoders[key])
        return self.decoders[key]

    def placed(self, module: Any) -> Any:
        """Return a module where and in the precision that is measured, for inference."""
        return moved(module, self.device, self.dtype).eval().requires_grad_(False)

    @cached_property
    def fastvithd(self) -> FastViTHD:
        """Return the released encoder, fused."""
        made = FastViTHD(FastViTHDConfig.variant("fastvithd", form="fused"))
        encoder = cast(FastViTHD, self.placed(made)).fuse()
        if self.device == "cpu":
            encoder.pack(PACKED_BYTES)
        return encoder

    def projector(self, seen: int, width: int) -> nn.Module:
        """Return two linear layers with GELU between them."""
        layers = nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))
        return cast(nn.Module, self.placed(layers))

    def fastvlm(self, decoder: str, size: int, tiles: int = 1) -> Contender:
        """Return FastVLM as our engine runs it."""
        language = self.packed_decoder(decoder)
        vision = self.fastvithd
        width = int(language.config.hidden_size)
        projector = self.projector(vision.config.hidden_size, width)
        views = count_parts(tiles)

        return Contender(
            f"FastVLM-{decoder}",
            "fastvlm",
            size * tiles,
            (views, 3, size, size),
            views * (size // REDUCTION) ** 2,
            vision,
            projector,
            language,
            grid_features(vision, projector),
            self.our_engine(language),
        )

    def our_engine(self, language: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """Return the prefill and the head as `fastvlm.decoding` runs them.

        Without weights they can't be held against the model, and are only counted: the arithmetic
        is that of `transformers`.
        """
        if language.device.type == "meta":
            return self.in_transformers(language)
        decoder = split_decoder(language)

        def logits(embeddings: Tensor) -> Tensor:
            length = embeddings.shape[1]
            cache = decoder.cache(1, length + 1)
            positions = cache.positions([0], length)
            x = decoder.forward_layers(embeddings, positions, cache, range(decoder.depth))
            return decoder.head(x[:, -1:])

        return logits

    def in_transformers(self, language: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """Return the prefill and the head as `transformers` runs them."""

        def logits(embeddings: Tensor) -> Tensor:
            return language(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1).logits

        return logits

    def composite(
        self,
        name: str,
        side: int,
        model: Any,
        pixels: tuple[int, ...],
        visual: int,
        **options: Any,
    ) -> Contender:
        """Return a composite model of `transformers`, run by its own code."""
        language = self.decoder("0.5B")

        def features(pixel_values: Tensor) -> Tensor:
            found = model.get_image_features(pixel_values=pixel_values, **options).pooler_output
            return found[0] if isinstance(found, list | tuple) else found.flatten(0, 1)

        return Contender(
            name,
            "transformers",
            side,
            pixels,
            visual,
            model.vision_tower,
            model.multi_modal_projector,
            language,
            features,
            self.in_transformers(language),
        )

    def without_decoder(self, model_class: Any, config: Any) -> Any:
        """Return a composite model whose own decoder, which is not used, is a small one."""
        width = DECODERS["0.5B"]["hidden_size"]
        config.text_config = AutoConfig.for_model(
            "qwen2", hidden_size=width, num_hidden_layers=0, vocab_size=8, intermediate_size=8,
            num_attention_heads=14, num_key_value_heads=2,
        )  # fmt: skip
        return self.placed(model_class(config).model)

    def llava_onevision(self) -> Contender:
        """Return LLaVA-OneVision-0.5B: SigLIP-SO400M at 384 px, the whole and nine tiles."""
        vision = SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        )
        grid = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
        config = LlavaOnevisionConfig(
            vision_config=vision.to_dict(),
            image_token_index=0,
            video_token_index=1,
            image_grid_pinpoints=grid,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
        )
        model = self.without_decoder(LlavaOnevisionForConditionalGeneration, config)
        # Nine tiles of 27 x 27 with a token at the end of each row, and the whole.
        visual = 81 * (81 + 1) + 27 * 27
        sizes = torch.tensor([[1152, 1152]], device="cpu")
        return self.composite(
            "LLaVA-OneVision-0.5B", 1152, model, (1, 10, 3, 384, 384), visual, image_sizes=sizes
        )

    def llava(self) -> Contender:
        """Return LLaVA-1.5's CLIP ViT-L/14 at 336 px, before the decoder of 0.5B."""
        vision = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
        config = LlavaConfig(vision_config=vision.to_dict(), image_token_index=0)
        model = self.without_decoder(LlavaForConditionalGeneration, config)
        return self.composite("LLaVA-1.5 with 0.5B", 336, model, (1, 3, 336, 336), 576)

    def convnext(self, size: int) -> Contender:
        """Return ConvNeXt-L, one token for 32 x 32 pixels, before the decoder of 0.5B."""
        config = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536])
        vision = AutoModel.from_config(config)
        vision = moved(self.placed(vision), memory_format=torch.channels_last)
        language = self.decoder("0.5B")
        projector = self.projector(1536, int(language.config.hidden_size))

        return Contender(
            "ConvNeXt-L with 0.5B",
            "transformers",
            size,
            (1, 3, size, size),
            (size // 32) ** 2,
            vision,
            projector,
            language,
            grid_features(vision, projector),
            self.in_transformers(language),
        )


def grid_features(vision: nn.Module, projector: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return encoder and projector, for encoders that give a grid of features."""

    def features(pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        states = vision(pixels).last_hidden_state
        return projector(states.flatten(2).transpose(1, 2)).flatten(0, 1)

    return features
