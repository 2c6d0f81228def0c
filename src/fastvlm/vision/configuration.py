"""FastViTHD's configuration, and the table of its variants."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fastvlm.functional.errors import InputError

REDUCTION = 64
"""Pixels of the image's side for each visual token."""
ENCODER_FORMS = ("training", "reparameterized", "fused")

# One row a variant. The first is the one that Apple released (arXiv 2412.13303, section 3.2).
VARIANTS: dict[str, dict[str, Any]] = {
    "fastvithd": {
        "depths": (2, 12, 24, 4, 2),
        "widths": (96, 192, 384, 768, 1536),
        "image_size": 1024,
    },
    "fastvithd-small": {
        "depths": (1, 2, 4, 2, 1),
        "widths": (16, 32, 96, 192, 384),
        "layer_scale_init": 1.0,
        "image_size": 192,
    },
}


class FastViTHDConfig(PreTrainedConfig):
    """Configuration of a FastViTHD vision encoder (arXiv 2412.13303).

    Args:
        depths: Blocks in each of the five stages.
        widths: Channels of each of the five stages; the last two must be multiples of `head_dim`.
        mlp_ratio: Hidden width of a feed-forward network over its input width.
        head_dim: Size of one attention head in stages 4 and 5.
        layer_scale_init: Initial value of every layer scale.
        image_size: Side in pixels of the square images that the model is meant for. Any height
            and width that are multiples of 64 are accepted.
        form: `training` (with the parallel branches), `reparameterized` (branches folded into one
            convolution each: the form of Apple's released checkpoints) or `fused` (the remaining
            BatchNorms and layer scales folded too: the form for inference).
    """

    model_type = "fastvithd"

    depths: tuple[int, ...] | list[int] = (2, 12, 24, 4, 2)
    widths: tuple[int, ...] | list[int] = (96, 192, 384, 768, 1536)
    mlp_ratio: int = 4
    head_dim: int = 32
    layer_scale_init: float = 1e-5
    image_size: int = 1024
    initializer_range: float = 0.02
    form: str = "training"
    hidden_size: int = 3072

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive the output width and check the shape.

        Raises:
            InputError: A stage is missing, a width doesn't divide, or the form is unknown.
        """
        self.depths, self.widths = tuple(self.depths), tuple(self.widths)
        if len(self.depths) != 5 or len(self.widths) != 5:
            raise InputError(
                f"FastViTHD has five stages; got depths {self.depths} and widths {self.widths}."
            )
        if any(width % self.head_dim for width in self.widths[3:]):
            raise InputError(
                f"The widths of stages 4 and 5 must be multiples of the head size {self.head_dim};"
                f" got {self.widths[3:]}."
            )
        if self.form not in ENCODER_FORMS:
            raise InputError(f"The form is one of {', '.join(ENCODER_FORMS)}; got {self.form!r}.")
        # What transformers' projector reads: the tail doubles the last stage's width.
        self.hidden_size = 2 * self.widths[-1]
        super().__post_init__(**kwargs)

    @classmethod
    def variant(cls, name: str, **overrides: Any) -> FastViTHDConfig:
        """Return a row of `VARIANTS`, with fields overridden.

        Raises:
            InputError: No variant has this name.
        """
        if name not in VARIANTS:
            raise InputError(f"The variants are {', '.join(VARIANTS)}; got {name!r}.")
        return cls(**{**VARIANTS[name], **overrides})


AutoConfig.register("fastvithd", FastViTHDConfig, exist_ok=True)
