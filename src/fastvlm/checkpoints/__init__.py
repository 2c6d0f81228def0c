"""Checkpoints of FastVLM models in every published layout: reading, recognising, converting."""

from fastvlm.checkpoints.loading import LoadOptions, PretrainedOptions, load_checkpoint
from fastvlm.checkpoints.saving import OUTPUT_LAYOUTS, save_checkpoint

__all__ = [
    "OUTPUT_LAYOUTS",
    "LoadOptions",
    "PretrainedOptions",
    "load_checkpoint",
    "save_checkpoint",
]
