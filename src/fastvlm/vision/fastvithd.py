"""FastViTHD, the hybrid convolution / attention encoder of FastVLM (arXiv 2412.13303, 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastvlm.functional.errors import InputError
from fastvlm.functional.packed import pack
from fastvlm.functional.placement import moved
from fastvlm.functional.products import product_of_many
from fastvlm.vision.configuration import REDUCTION, FastViTHDConfig
from fastvlm.vision.convolutions import Branches, ConvNorm, RepConv
from fastvlm.vision.layers import (
    AttentionBlock,
    ConvFFN,
    Downsample,
    LayerScale,
    MixerBlock,
    PositionEncoding,
    RepMixer,
    SelfAttention,
)


class Stage(nn.Module):
    """A downsampling (but for the first stage), a position encoding (stages 4, 5), and blocks."""

    def __init__(self, config: FastViTHDConfig, index: int) -> None:
        super().__init__()
        width, attends = config.widths[index], index >= 3
        self.downsample = (
            Downsample(config.widths[index - 1], width, config.form) if index else nn.Identity()
        )
        self.pos_emb = PositionEncoding(width, config.form) if attends else nn.Identity()
        scale, ratio = config.layer_scale_init, config.mlp_ratio
        self.blocks = nn.Sequential(
            *(
                AttentionBlock(width, ratio, config.head_dim, scale, config.form)
                if attends
                else MixerBlock(width, ratio, scale, config.form)
                for _ in range(config.depths[index])
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.pos_emb(self.downsample(x)))


class FastViTHD(PreTrainedModel):
    """An image in, a grid of visual features out: one for every 64 x 64 pixels.

    The model type is `fastvithd`; `AutoModel` builds it, so that it serves as the vision tower of
    `transformers`' `FastVlmForConditionalGeneration`.
    """

    config: FastViTHDConfig
    config_class = FastViTHDConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = "image"
    # transformers makes a set of any iterable; its annotation knows sets and lists only.
    _no_split_modules = ("MixerBlock", "AttentionBlock")  # type: ignore[assignment]

    def __init__(self, config: FastViTHDConfig) -> None:
        super().__init__(config)
        width, form = config.widths[0], config.form
        self.stem = nn.Sequential(
            RepConv(3, width, 3, stride=2, form=form),
            RepConv(width, width, 3, stride=2, groups=width, form=form),
            RepConv(width, width, 1, branches=Branches(identity=True), form=form),
        )
        self.stages = nn.Sequential(*(Stage(config, index) for index in range(5)))
        last = config.widths[-1]
        self.final_conv = RepConv(
            last,
            2 * last,
            3,
            groups=last,
            branches=Branches(small=1),
            after="squeeze-excite",
            form=form,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' own initialisers leave alone what a checkpoint has loaded.
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            init.constant_(module.gamma, self.config.layer_scale_init)
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (batch, 3, height, width) in [0, 1]; height and width multiples of 64.

        Returns:
            `last_hidden_state` of shape (batch, hidden_size, height / 64, width / 64).

        Raises:
            InputError: The height or the width is no multiple of 64.
        """
        height, width = pixel_values.shape[-2:]
        if height % REDUCTION or width % REDUCTION or not height * width:
            raise InputError(
                f"An image's height and width must be multiples of {REDUCTION} pixels;"
                f" got {height} x {width}."
            )
        # Channels side by side make the products over channels (1x1 convolutions, attention) plain.
        pixels = pixel_values.to(self.dtype, memory_format=torch.channels_last)
        features = self.final_conv(self.stages(self.stem(pixels)))
        return BaseModelOutputWithPooling(last_hidden_state=features)

    @torch.no_grad()
    def reparameterize(self) -> FastViTHD:
        """Fold the parallel branches, in place: the form of Apple's released checkpoints.

        BatchNorms and layer scales outside the branches stay. Returns the model itself, in
        evaluation mode, because the folded statistics are those of evaluation.
        """
        if self.config.form == "training":
            for module in list(self.modules()):
                if isinstance(module, RepConv | RepMixer | PositionEncoding):
                    module.reparameterize()
            self.config.form = "reparameterized"
        return self.eval()

    @torch.no_grad()
    def fuse(self) -> FastViTHD:
        """Fold branches, BatchNorms and layer scales, in place: the form for inference.

        The outputs agree with the unfused model's to rounding. Returns the model itself.
        """
        self.reparameterize()
        for module in list(self.modules()):
            if isinstance(module, ConvNorm | MixerBlock | AttentionBlock):
                module.fold()
        self.config.form = "fused"
        return moved(self, memory_format=torch.channels_last)

    def pack(self, most_bytes: int) -> int:
        """Lay out the products over channels for inference on a CPU, as far as they fit.

        They are then a fifth faster in float32, by oneDNN's kernels, which compute GELU with them.
        What changes afterwards is computed as before. See `fastvlm.functional.packed`.

        Args:
            most_bytes: The most memory for packed weights, which are a second copy.

        Returns:
            The bytes that they take.
        """
        taken = 0
        for part in self.modules():
            if isinstance(part, ConvFFN):
                taken += part.pack(most_bytes - taken)
            elif isinstance(part, SelfAttention):
                taken += pack([part], most_bytes - taken, product_of_many)
        return taken


AutoModel.register(FastViTHDConfig, FastViTHD, exist_ok=True)
