"""FastViTHD: the encoder, its configuration, and the preparation of images."""

from fastvlm.vision.configuration import VARIANTS, FastViTHDConfig
from fastvlm.vision.fastvithd import FastViTHD

__all__ = ["VARIANTS", "FastViTHD", "FastViTHDConfig"]
